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
    found = []
    for words in (("rev-parse", "--short=9", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
        found.append(done.stdout.strip())
    return found[0] + ", changed" * bool(found[1])


@functools.cache
def machine() -> str:
    """The devices that JAX computes on, for example "2 x Intel(R) Xeon(R) CPU @ 2.20GHz" or "8 x NVIDIA H200"."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} x {devices[0].device_kind}"
    named = None
    if _PROCESSORS.exists():
        named = re.search(r"model name\s*: (.+)", _PROCESSORS.read_text())
    return f"{os.cpu_count()} x {named[1] if named else platform.processor() or platform.machine()}"
