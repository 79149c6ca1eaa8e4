"""Kills runs with SIGKILL at chosen moments; after a restart they must end like uninterrupted runs."""

import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 60  # seconds for children to notice that their parent is gone


class Command:
    """A Python command in a process group of its own."""

    def __init__(self, *words, **environment):
        self._errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,
        )

    def alive(self):
        return self.process.poll() is None

    def finish(self):
        """Waits for the end, and checks that it is successful."""
        assert self.process.wait() == 0, self.errors()

    def kill(self):
        """Kills the process and waits until its children, such as batch workers, have ended. Returns their number."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split() if self.alive() else []
        self.process.kill()
        self.process.wait()
        deadline = time.monotonic() + PATIENCE
        while left := [child for child in children if Path(f"/proc/{child}").exists()]:
            assert time.monotonic() < deadline, f"{left} outlive the run"
            time.sleep(0.05)
        return len(children)

    def errors(self):
        self._errors.seek(0)
        return self._errors.read().decode()[-3000:]


class Function:
    """A call in a process of its own, forked from one that has imported the function's module."""

    def __init__(self, target, *arguments):
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload([target.__module__])
        self._process = server.Process(target=target, args=arguments, daemon=True)
        self._process.start()

    def alive(self):
        return self._process.is_alive()

    def finish(self):
        self._process.join()
        assert self._process.exitcode == 0

    def kill(self):
        self._process.kill()
        self._process.join()
        return 0

    def errors(self):
        return f"exit code {self._process.exitcode}"


def more_lines(path, count=1):
    """The moment when a file has `lines` more lines than before the run began."""

    def lines():
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def moment():
        before = lines()
        return lambda: lines() >= before + count

    return moment


def half_written(folder, pattern):
    """The moment when a file or folder that matches the pattern has been created or changed."""

    def unfinished():
        found = set()
        for path in folder.glob(pattern):
            try:
                found.add((path, path.stat().st_ctime_ns))
            except FileNotFoundError:  # finished while we looked
                pass
        return found

    def moment():
        before = unfinished()
        return lambda: bool(unfinished() - before)

    return moment


def wait_for(child, reached):
    """Returns when `reached()` is true; the child must live until then."""
    while not reached():
        assert child.alive(), f"the run ended too soon: {child.errors()}"
        time.sleep(0.002)


class Killed(NamedTuple):
    in_time: bool  # before the run ended by itself
    children: int


def kill_at(start, moment, pause=0.0):
    """Starts a run and kills it `seconds` after a moment."""
    reached, in_time = moment(), False
    child = start()
    try:
        wait_for(child, reached)
        time.sleep(pause)
        in_time = child.alive()
    finally:
        children = child.kill()
    return Killed(in_time, children)


def kill_and_finish(start, moment, times, longest=0.0):
    """Kills a run again and again, up to `longest` seconds after each moment, and lets the last one end."""
    rng = random.Random(0)
    for _ in range(times):
        assert kill_at(start, moment, rng.uniform(0, longest)).in_time
    start().finish()


def contents(folder, pattern="*"):
    """The contents of matching files below a folder, by their relative paths."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob(pattern)) if path.is_file()
    }
