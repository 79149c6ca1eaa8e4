"""Protocols are frozen and named; a record changes when, and only when, what decides a score changes."""

import dataclasses
import json
from pathlib import Path

import pytest

from lvlm_jax import methods
from lvlm_jax.evaluation import Data, get, record
from lvlm_jax.evaluation.benchmarks import pope
from tests.evaluation.builders import pope_folder

LLAVA = "\nAnswer the question using a single word or phrase."


def test_protocols_as_published():
    said = {"official": (LLAVA, 128), "opera": ("", 10), "lmms-eval": (LLAVA, 128)}
    for name, (suffix, length) in (said | {"vcd": (" Please answer this question with one word.", 64)}).items():
        settings = get(f"pope/{name}")
        assert (settings.suffix, settings.max_new_tokens, settings.parser) == (suffix, length, name)
    for name, length, truncate in (("opera-512", 512, "none"), ("opera-64", 64, "sentence")):
        settings = get(f"chair/{name}")
        assert (settings.max_new_tokens, settings.truncate, settings.parser) == (length, truncate, "nltk")
    assert get("chair/1024").max_new_tokens == 1024 and get("chair/pai-512").parser == "nltk"
    assert get("chair/opera-512").template == "Please describe this image in detail."
    assert get("chair/pai-512").template == "Please help me describe the image in detail."


@pytest.fixture
def found(tmp_path):
    folder = pope_folder(tmp_path, {"random": "yyyn"})
    data = Data(folder, groups=("random",))
    settings = get("pope/vcd")
    return folder, settings, pope.read(data, settings), pope.question_files(data, settings)


def test_record(found):
    folder, settings, questions, files = found
    made = record(settings, questions, files, model="llava", revision="abc", method=methods.CMAC(alpha=2.5), seed=7)
    expected = {"name": "pope/vcd", "parser": "vcd", "max_new_tokens": 64, "temperature": 1.0}
    assert expected.items() <= made["protocol"].items()
    assert (made["questions"], made["images"]["count"], made["seed"]) == (4, 2, 7) and made["version"]
    assert len(made["images"]["list_sha256"]) == len(made["files"]["random"]["sha256"]) == 64
    assert made["files"]["random"]["name"] == "coco_pope_random.json"
    assert made["model"] == {"name": "llava", "sha256": None, "revision": "abc"}
    assert made["method"]["name"] == "CMAC" and made["method"]["alpha"] == 2.5
    assert json.loads(json.dumps(made)) == made
    # It tells files and image lists apart.
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
