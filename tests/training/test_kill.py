"""Killed at any moment, a run that is started again ends as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training import interrupted, line

pytestmark = pytest.mark.full_compiler  # bit-equal to what another process learns

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 0.03  # per step


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The log of a run that nobody killed."""
    workdir = tmp_path_factory.mktemp("whole")
    interrupted.train(workdir, seconds=0, workers=0)
    return line.curve(workdir)


def begin(workdir, workers=1):
    """The run in a process group of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-m", "tests.training.interrupted", str(workdir), str(SECONDS), str(workers)]
    streams = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    return subprocess.Popen(words, cwd=ROOT, env=environment, **streams)


def finish(process):
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()[-3000:]


def kill(process):
    """Also waits for its children, such as those that make batches, to notice; how many they were."""
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while left := [worker for worker in workers if Path(f"/proc/{worker}").exists()]:
        assert time.monotonic() < deadline, f"{left} outlive the run"
        time.sleep(0.05)
    return len(workers)


def wait_until(holds, process):
    while not holds():
        assert process.poll() is None, f"the run ended too soon: {process.communicate()[1].decode()[-3000:]}"
        time.sleep(0.002)


def lines(workdir):
    log = workdir / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def kill_after(workdir, seconds):
    """Starts the run and kills it some time after it has written to its log."""
    before, process = lines(workdir), begin(workdir, workers=0)
    wait_until(lambda: lines(workdir) != before, process)
    time.sleep(seconds)
    kill(process)


def kill_while_saving(workdir, workers=0):
    """Starts the run and kills it with a checkpoint half written; how many children it had."""

    def unfinished():
        return {(path, path.stat().st_ctime_ns) for path in (workdir / "line").glob("*tmp*")}

    before, process = unfinished(), begin(workdir, workers)
    wait_until(lambda: changed(unfinished, before), process)
    return kill(process)


def changed(unfinished, before):
    try:
        return unfinished() - before
    except FileNotFoundError:  # finished while we looked
        return False


def test_a_run_that_is_killed_and_stopped_ends_like_one_that_was_not(whole, tmp_path):
    assert kill_while_saving(tmp_path, workers=1) == 2  # one makes batches, one is Python's resource tracker
    # A scheduler asks all processes of the run to stop; those that make batches leave it to the first.
    before, process = lines(tmp_path), begin(tmp_path)
    wait_until(lambda: lines(tmp_path) > before + 5, process)
    os.killpg(process.pid, signal.SIGTERM)
    finish(process)
    last = line.records(tmp_path)[-1]["step"]
    assert last < interrupted.STEPS and (tmp_path / "line" / str(last)).is_dir()
    finish(begin(tmp_path, workers=0))
    assert line.curve(tmp_path) == whole


@pytest.mark.slow
def test_twenty_kills(whole, tmp_path):
    """At random moments of several runs, each of which is in the end finished."""
    rng = random.Random(0)
    for run in range(5):
        workdir = tmp_path / str(run)
        for _ in range(4):
            if rng.random() < 0.4:
                kill_while_saving(workdir)
            else:
                kill_after(workdir, rng.uniform(0, 0.4))
        finish(begin(workdir, workers=0))
        assert line.curve(workdir) == whole
