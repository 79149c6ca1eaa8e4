"""Protocols are frozen and named; a record changes when, and only when, what decides a score changes."""

import dataclasses
import json
from pathlib import Path

import pytest

from lvlm_jax import methods
from lvlm_jax.evaluation import Data, get, record
from lvlm_jax.evaluation.benchmarks import pope
from tests.evaluation.builders import pope_folder


@pytest.mark.parametrize(
    ("name", "suffix", "length", "parser"),
    [
        ("pope/official", "\nAnswer the question using a single word or phrase.", 128, "official"),
        ("pope/opera", "", 10, "opera"),
        ("pope/vcd", " Please answer this question with one word.", 64, "vcd"),
        ("pope/lmms-eval", "\nAnswer the question using a single word or phrase.", 128, "lmms-eval"),
    ],
)
def test_pope_as_published(name, suffix, length, parser):
    settings = get(name)
    assert (settings.suffix, settings.max_new_tokens, settings.parser) == (suffix, length, parser)


def test_chair_as_published():
    assert get("chair/opera-64").truncate == "sentence" and get("chair/opera-512").truncate == "none"
    for name, length in (("opera-512", 512), ("opera-64", 64), ("1024", 1024)):
        assert get(f"chair/{name}").max_new_tokens == length
    named = ("opera-512", "opera-64", "pai-512")
    assert {name: get(f"chair/{name}").parser for name in named} == dict.fromkeys(named, "nltk")
    assert get("chair/opera-512").template == "Please describe this image in detail."
    assert get("chair/pai-512").template == "Please help me describe the image in detail."


@pytest.fixture
def found(tmp_path):
    folder = pope_folder(tmp_path, {"random": "yyyn"})
    data = Data(folder, groups=("random",))
    settings = get("pope/vcd")
    return folder, settings, pope.read(data, settings), pope.question_files(data, settings)


def test_record(found):
    _, settings, questions, files = found
    made = record(settings, questions, files, model="llava", revision="abc", method=methods.CMAC(alpha=2.5), seed=7)
    assert made["protocol"]["name"] == "pope/vcd" and made["protocol"]["parser"] == "vcd"
    assert made["protocol"]["max_new_tokens"] == 64 and made["protocol"]["temperature"] == 1.0
    assert made["questions"] == 4 and made["images"]["count"] == 2
    assert len(made["images"]["list_sha256"]) == len(made["files"]["random"]["sha256"]) == 64
    assert made["files"]["random"]["name"] == "coco_pope_random.json"
    assert made["model"] == {"name": "llava", "sha256": None, "revision": "abc"}
    assert made["method"]["name"] == "CMAC" and made["method"]["alpha"] == 2.5
    assert made["seed"] == 7 and made["version"]
    assert json.loads(json.dumps(made)) == made


def test_record_tells_files_and_image_lists_apart(found):
    folder, settings, questions, files = found
    before = record(settings, questions, files)
    assert record(settings, questions, files) == before
    assert record(settings, questions[::-1], files)["images"]["list_sha256"] != before["images"]["list_sha256"]
    # Where a folder lies does not matter.
    moved = [dataclasses.replace(q, images=(Path("elsewhere") / q.images[0].name,)) for q in questions]
    assert record(settings, moved, files)["images"] == before["images"]
    path = folder / "coco/coco_pope_random.json"
    path.write_text(path.read_text().replace("a dog", "a cat"))
    assert record(settings, questions, files)["files"] != before["files"]


def test_braces_in_questions_are_left_alone(found):
    question = dataclasses.replace(found[2][0], text="What is {0} in {question}?")
    assert get("pope/opera").prompt(question) == "What is {0} in {question}?"
