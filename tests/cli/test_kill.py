"""Commands that are killed several times and repeated end with the usual files and leave no others."""

import functools
import json
import os
import random
import re
import shutil
import sys

import pytest

from lvlm_jax import LVLM
from lvlm_jax.cli import main
from lvlm_jax.pocket.splits import write_split
from lvlm_jax.weights import names
from tests.cli.command import write_small
from tests.killing import Function, contents, half_written, kill_at, more_lines

pytestmark = [pytest.mark.slow, pytest.mark.full_compiler]  # the answers of other processes

RUNS = 5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small model, questions about an image, and a split of the drawn world."""
    folder = tmp_path_factory.mktemp("world")
    write_small(folder / "model")
    asked = ({"question_id": n, "image": "sample.png", "text": f"Is there a dog? {n}"} for n in range(160))
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
    write_split(folder / "split", "test", 40)
    return folder


def run(world, words):
    """`lvlm WORDS` in a process of its own; programs are compiled once for all."""
    os.environ |= {"XDG_CACHE_HOME": str(world / "cache"), "LVLM_JAX_COMPILATION_CACHE": "1", "JAX_PLATFORMS": "cpu"}
    sys.argv = ["lvlm", *map(str, words)]
    sys.stdout = sys.stderr = open(os.devnull, "w")
    main.main()


def save(world, folder):
    os.environ["JAX_PLATFORMS"] = "cpu"
    LVLM.from_pretrained(world / "model").save_pretrained(folder, overwrite=True)


def infer(world, out):
    words = ["--model", world / "model", "--image-folder", names.pocket_file("checkpoint").parent]
    words += ["--question-file", world / "questions.jsonl", "--answers-file", out / "log.0.jsonl"]
    return ["infer", *words, "--max_new_tokens", "8", "--batch-size", "4", "--temperature", "1"]


def evaluate(world, out):
    words = ["--protocol", "pope/strict", "--data", world / "split", "--model", world / "model", "--out", out]
    return ["evaluate", *words, "--resamples", "10"]


@pytest.mark.parametrize("command, kills", [(infer, 8), (evaluate, 4)])
def test_answers_are_those_of_a_run_that_nobody_disturbed(command, kills, world, tmp_path):
    def start(name):
        return Function(run, world, command(world, tmp_path / name))

    start("whole").finish()
    whole, rng = contents(tmp_path / "whole"), random.Random(0)
    for folder in (tmp_path / str(number) for number in range(RUNS)):
        again = functools.partial(start, folder.name)
        # The first is killed while it makes its first files, the others behind an answer.
        assert kill_at(again, half_written(folder, "*"), rng.uniform(0, 0.02)).in_time
        for _ in range(kills - 1):
            assert kill_at(again, more_lines(folder / "log.0.jsonl"), rng.uniform(0, 0.1)).in_time
        again().finish()
        found = contents(folder)
        assert found.keys() == whole.keys()
        assert [name for name in whole if untimed(found[name]) != untimed(whole[name]) and name != "scores.json"] == []


def untimed(written):
    """A file's lines without the seconds that batches took; scores.json sums them up."""
    return re.sub(rb'"seconds": [\d.e-]+', b"", written)


@pytest.mark.parametrize("how", ["convert", "save"])
def test_a_folder_holds_one_checkpoint_or_the_other(how, world, tmp_path):
    folder = tmp_path / "out" / "model"
    words = ["convert", world / "model", folder, "--dtype", "bfloat16", "--overwrite"]

    def start():
        return Function(run, world, words) if how == "convert" else Function(save, world, folder)

    start().finish()
    new = contents(folder)
    shutil.rmtree(folder)
    shutil.copytree(world / "model", folder)
    (folder / "README.md").write_text("old")
    old, rng = contents(folder), random.Random(0)
    for _ in range(RUNS):
        kill_at(start, half_written(folder.parent, ".model.partial-*"), rng.uniform(0, 0.02))
        assert contents(folder) in (old, new)
    start().finish()
    assert contents(folder) == new and [entry.name for entry in folder.parent.iterdir()] == ["model"]
