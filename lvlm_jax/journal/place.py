"""Where a run was made: the commit of this code, and the machine."""

import functools
import os
import pathlib
import platform
import re
import subprocess

import jax

ROOT = pathlib.Path(__file__).resolve().parents[2]
_PROCESSORS = pathlib.Path("/proc/cpuinfo")


@functools.cache
def commit(root: pathlib.Path = ROOT) -> str | None:
    """The first nine digits of a checkout's commit, and "changed" if files differ from it.

    Returns:
        None if the code is not in its own checkout (an installed package), or without git.
    """
    if not (root / ".git").exists():
        return None
    outputs = []
    for words in (("rev-parse", "--short=9", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
        outputs.append(done.stdout.strip())
    return outputs[0] + ", changed" * bool(outputs[1])


@functools.cache
def machine() -> str:
    """The devices that JAX computes on, for example "2 x Intel(R) Xeon(R) CPU @ 2.20GHz" or "8 x NVIDIA H200"."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} x {devices[0].device_kind}"
    match = None
    if _PROCESSORS.exists():
        match = re.search(r"model name\s*: (.+)", _PROCESSORS.read_text())
    return f"{os.cpu_count()} x {match[1] if match else platform.processor() or platform.machine()}"
