"""Kill -9 in the middle of a run, five times: the answers are those of a run that nobody disturbed."""

import json

import pytest

from lvlm_jax.evaluation import Data, get
from lvlm_jax.evaluation.run import Options, Run
from lvlm_jax.pocket.splits import write_split
from tests.evaluation.fakes import Oracle
from tests.killing import ROOT, Command, Function, contents, kill_and_finish, kill_at, more_lines

pytestmark = pytest.mark.full_compiler  # the answers of another process

KILLS = 5
SPLITS = ("random", "popular", "adversarial")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A split with more than 500 questions."""
    folder = tmp_path_factory.mktemp("pocket") / "world"
    write_split(folder, "test", 40)
    return folder


def answer(world, out, pause):
    """One process of the run, with a stand-in for the model that takes its time."""
    run = Run("oracle", "float32", get("pope/strict"), Data(world), out, None, Options(7, resamples=10))
    run.ask(Oracle(pause))
    assert run.score() is not None


def same_answers(first, second):
    """The files equal each other byte for byte, and no question is there twice."""
    for split in SPLITS:
        assert contents(first, f"{split}.jsonl") == contents(second, f"{split}.jsonl")
        ids = [json.loads(line)["question_id"] for line in (first / f"{split}.jsonl").read_text().splitlines()]
        assert len(set(ids)) == len(ids) > 100
    figures = [json.loads((out / "scores.json").read_text())["figures"] for out in (first, second)]
    assert figures[0] == figures[1]


def test_killed_five_times(world, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    answer(world, whole, 0.0)
    log = killed / "log.0.jsonl"
    for _ in range(KILLS):
        assert kill_at(lambda: Function(answer, world, killed, 0.02), more_lines(log, 40)).in_time
    assert not (killed / "scores.json").exists()
    with log.open("ab") as file:
        file.write(b'{"group": "random", "id": "1", "te')  # a kill may cut a line in two
    answer(world, killed, 0.0)
    same_answers(whole, killed)


@pytest.mark.slow
def test_killed_five_times_with_a_model(world, tmp_path):
    """The programs of the pocket model are compiled once for all runs."""

    def start(out):
        words = ["--protocol", "pope/strict", "--data", world, "--model", "pocket", "--out", tmp_path / out]
        cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "LVLM_JAX_COMPILATION_CACHE": "1"}
        return Command(ROOT / "tools" / "evaluate.py", *words, "--resamples", "10", **cache)

    start("whole").finish()
    kill_and_finish(lambda: start("killed"), more_lines(tmp_path / "killed" / "log.0.jsonl", 40), KILLS)
    same_answers(tmp_path / "whole", tmp_path / "killed")
