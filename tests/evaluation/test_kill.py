"""Kill -9 in the middle of a run, five times: the answers are those of a run that nobody disturbed."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lvlm_jax.evaluation import Data, get
from lvlm_jax.evaluation.run import Options, Run
from lvlm_jax.pocket.splits import write_split
from tests.evaluation.fakes import Oracle

pytestmark = pytest.mark.full_compiler  # the answers of another process

ROOT = Path(__file__).resolve().parents[2]
KILLS = 5
SPLITS = ("random", "popular", "adversarial")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A split with more than 500 questions."""
    folder = tmp_path_factory.mktemp("pocket") / "world"
    write_split(folder, "test", 40)
    return folder


def answer(world: Path, out: Path, pause: float) -> None:
    """One process of the run, with a stand-in for the model that takes its time."""
    run = Run("oracle", "float32", get("pope/strict"), Data(world), out, None, Options(7, resamples=10))
    run.ask(Oracle(pause))
    assert run.score() is not None


def lines(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def killed(start, log: Path) -> None:
    """Starts a run five times, and kills it each time as soon as it has answered some more."""
    for _ in range(KILLS):
        before, process = lines(log), start()
        try:
            while lines(log) < before + 40:
                assert process.alive(), "the run ended before it could be killed"
                time.sleep(0.002)
        finally:
            process.kill()


def same_answers(first: Path, second: Path) -> None:
    """The files equal each other byte for byte after sorting, and no question is there twice."""
    for split in SPLITS:
        ours, theirs = (sorted((out / f"{split}.jsonl").read_bytes().split(b"\n")) for out in (first, second))
        assert ours == theirs
        ids = [json.loads(line)["question_id"] for line in ours if line]
        assert len(set(ids)) == len(ids) > 100
    figures = [json.loads((out / "scores.json").read_text())["figures"] for out in (first, second)]
    assert figures[0] == figures[1]


class Forked:
    """`answer` in a process of its own, forked from a server that has imported everything."""

    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.evaluation.test_kill"])

    def __init__(self, *arguments):
        self._process = self.server.Process(target=answer, args=arguments, daemon=True)
        self._process.start()

    def alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def test_killed_five_times(world, tmp_path):
    answer(world, tmp_path / "whole", 0.0)
    log = tmp_path / "killed" / "log.0.jsonl"
    killed(lambda: Forked(world, tmp_path / "killed", 0.02), log)
    assert not (tmp_path / "killed" / "scores.json").exists()
    with log.open("ab") as file:
        file.write(b'{"group": "random", "id": "1", "te')  # a kill may cut a line in two
    answer(world, tmp_path / "killed", 0.0)
    same_answers(tmp_path / "whole", tmp_path / "killed")


class Started:
    """`tools/evaluate.py` with the pocket model, whose programs are compiled once for all runs."""

    def __init__(self, world: Path, out: Path, cache: Path):
        words = [
            "--protocol",
            "pope/strict",
            "--data",
            world,
            "--model",
            "pocket",
            "--out",
            out,
            "--resamples",
            "10",
        ]
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tools" / "evaluate.py", *words], cwd=ROOT,
            env=os.environ | {"XDG_CACHE_HOME": str(cache), "LVLM_JAX_COMPILATION_CACHE": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.mark.slow
def test_killed_five_times_with_a_model(world, tmp_path):
    def start(out: str) -> Started:
        return Started(world, tmp_path / out, tmp_path / "cache")

    assert start("whole").process.wait() == 0
    killed(lambda: start("killed"), tmp_path / "killed" / "log.0.jsonl")
    assert start("killed").process.wait() == 0
    same_answers(tmp_path / "whole", tmp_path / "killed")
