"""Memory of this machine and this process, where the system tells."""

import re
from pathlib import Path

import jax

_STATUS, _FORGET, _MEMORY = (Path("/proc") / name for name in ("self/status", "self/clear_refs", "meminfo"))


def free_memory() -> int | None:
    """Bytes that a process may still take; None where the system does not tell."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", _MEMORY.read_text())
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None


def forget_peak() -> None:
    """Begins anew to look for the largest size of this process."""
    try:
        _FORGET.write_text("5")
    except OSError:
        pass


def peak_memory() -> int | None:
    """The largest size of this process since `forget_peak`, in bytes; None where the system does not tell."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None


def device_peak() -> int | None:
    """The most that was taken of the first device's own memory, in bytes; None for a CPU."""
    device = jax.devices()[0]
    stats = None if device.platform == "cpu" else device.memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None
