"""Memory of this machine and this process, if the system reports it."""

import re
from pathlib import Path

import jax

_STATUS, _FORGET, _MEMORY = (Path("/proc") / name for name in ("self/status", "self/clear_refs", "meminfo"))


def free_memory() -> int | None:
    """Bytes that a process may still allocate; None if the system does not report it."""
    try:
        match = re.search(r"MemAvailable:\s+(\d+) kB", _MEMORY.read_text())
    except OSError:
        return None
    return int(match.group(1)) * 1024 if match else None


def forget_peak() -> None:
    """Resets the peak memory of this process."""
    try:
        _FORGET.write_text("5")
    except OSError:
        pass


def peak_memory() -> int | None:
    """Peak memory of this process since `forget_peak`, in bytes; None if the system does not report it."""
    try:
        match = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    except OSError:
        return None
    return int(match.group(1)) * 1024 if match else None


def device_peak() -> int | None:
    """Peak memory on the first device, in bytes; None for a CPU."""
    device = jax.devices()[0]
    stats = None if device.platform == "cpu" else device.memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None
