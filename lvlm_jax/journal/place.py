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
        None if the code is not in its own checkout (an installed package), or if there is no git.
    """
    commands = (("rev-parse", "--short=9", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
    answers = [_git(root, *words) for words in commands]
    if any(done is None or done.returncode for done in answers):
        return None
    name, changes = (done.stdout.strip() for done in answers)
    return name + ", changed" * bool(changes)


@functools.cache
def in_history(recorded: str, root: pathlib.Path = ROOT) -> bool | None:
    """Whether a recorded commit is the checkout's commit or one before it.

    Args:
        recorded: what `commit` returned for a run.
        root: the checkout.

    Returns:
        None if that cannot be known: the text does not begin with a commit's name, the code is not in its own checkout,
        the checkout has only part of the history, or there is no git.
    """
    name = re.match(r"[0-9a-f]{7,40}\b", recorded)
    shallow = _git(root, "rev-parse", "--is-shallow-repository") if name else None
    if shallow is None or shallow.stdout.strip() != "false":
        return None
    done = _git(root, "merge-base", "--is-ancestor", name[0], "HEAD")
    return None if done is None else done.returncode == 0


def _git(root: pathlib.Path, *words: str) -> subprocess.CompletedProcess | None:
    """The result of a git command in a checkout; None if there is no checkout or no git."""
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None


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
