"""Killed at any moment, a run that is started again ends as if nothing had happened."""

import functools
import os
import random
import signal

import pytest

from tests.killing import Command, Function, contents, half_written, kill_at, more_lines, wait_for
from tests.training import interrupted, interrupted_objective, line

pytestmark = pytest.mark.full_compiler  # bit-equal to what another process learns


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The log of a run that nobody killed."""
    workdir = tmp_path_factory.mktemp("whole")
    interrupted.train(workdir, seconds=0, workers=0)
    return line.curve(workdir)


def begin(workdir, workers=0):
    return Command("-m", "tests.training.interrupted", workdir, 0.03, workers)  # seconds per step


@pytest.mark.slow
def test_a_run_that_is_killed_and_stopped_ends_like_one_that_was_not(whole, tmp_path):
    killed = kill_at(lambda: begin(tmp_path, workers=1), half_written(tmp_path / "line", "*tmp*"))
    assert killed.children == 2  # one makes batches, one is Python's resource tracker
    # A scheduler asks all processes of the run to stop; those that make batches leave it to the first.
    reached, run = more_lines(tmp_path / "log.jsonl", 6)(), begin(tmp_path, workers=1)
    wait_for(run, reached)
    os.killpg(run.process.pid, signal.SIGTERM)
    run.finish()
    last = line.records(tmp_path)[-1]["step"]
    assert last < interrupted.STEPS and (tmp_path / "line" / str(last)).is_dir()
    interrupted.train(tmp_path, seconds=0, workers=0)
    assert line.curve(tmp_path) == whole


@pytest.mark.slow
def test_twenty_kills(whole, tmp_path):
    """Runs are killed at random moments; each of them finishes in the end."""
    rng = random.Random(0)
    for run in range(5):
        workdir = tmp_path / str(run)
        start = functools.partial(begin, workdir)
        for _ in range(4):
            if rng.random() < 0.4:
                kill_at(start, half_written(workdir / "line", "*tmp*"))
            else:
                kill_at(start, more_lines(workdir / "log.jsonl"), rng.uniform(0, 0.4))
        start().finish()
        assert line.curve(workdir) == whole


@pytest.mark.slow
@pytest.mark.parametrize("name", interrupted_objective.RUNS)
def test_twenty_kills_of_an_objective(name, checkpoint, data, tmp_path):
    """Log and result are those of a run that nobody killed, byte for byte; some kills come during a save."""

    def start(workdir=tmp_path / "killed"):
        return Function(interrupted_objective.train, checkpoint, str(data), workdir, name)

    workdir, rng = tmp_path / "killed", random.Random(1)
    recipe = interrupted_objective.RUNS[name]["recipe"]
    for number in range(20):
        saving = half_written(workdir / recipe, "*tmp*")
        moment = saving if number % 3 == 0 else more_lines(workdir / "log.jsonl")
        assert kill_at(start, moment, 0 if number % 3 == 0 else rng.uniform(0, 0.1)).in_time
    for run in (start(), start(tmp_path / "whole")):
        run.finish()
    assert line.curve(workdir) == line.curve(tmp_path / "whole")
    results = [contents(tmp_path / name, "*.safetensors") for name in ("killed", "whole")]
    assert results[0] and results[0] == results[1]
