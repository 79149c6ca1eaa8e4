"""Kill -9 in the middle of a run, five times: the answers are those of an uninterrupted run."""

import json

from lvlm_jax.evaluation import Data, get
from lvlm_jax.evaluation.run import Options, Run
from lvlm_jax.pocket.splits import write_split
from tests.evaluation.fakes import Oracle
from tests.killing import Function, contents, kill_at, more_lines

KILLS = 5


def answer(world, out, pause):
    """One process of the run, with a slow stand-in for the model."""
    run = Run("oracle", "float32", get("pope/strict"), Data(world), out, None, Options(7, resamples=10))
    run.ask(Oracle(pause))
    assert run.score() is not None


def test_killed_five_times(tmp_path):
    """The files equal each other byte for byte, and no question is there twice."""
    world, whole, killed = (tmp_path / name for name in ("world", "whole", "killed"))
    write_split(world, "test", 40)  # more than 500 questions
    answer(world, whole, 0.0)
    log = killed / "log.0.jsonl"
    for _ in range(KILLS):
        assert kill_at(lambda: Function(answer, world, killed, 0.02), more_lines(log, 40)).in_time
    assert not (killed / "scores.json").exists()
    with log.open("ab") as file:
        file.write(b'{"group": "random", "id": "1", "te')  # a kill may cut a line in two
    answer(world, killed, 0.0)
    for split in ("random", "popular", "adversarial"):
        assert contents(whole, f"{split}.jsonl") == contents(killed, f"{split}.jsonl")
        ids = [json.loads(line)["question_id"] for line in (killed / f"{split}.jsonl").read_text().splitlines()]
        assert len(set(ids)) == len(ids) > 100
    figures = [json.loads((out / "scores.json").read_text())["figures"] for out in (whole, killed)]
    assert figures[0] == figures[1]
