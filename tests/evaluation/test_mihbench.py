"""MIHBench and other yes/no or one-word questions over several images."""

import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import Data, get, mihbench
from tests.evaluation.builders import write_lines


def rows(labels):
    return [
        {"question_id": i, "images": [f"{i}a.jpg", f"{i}b.jpg"], "question": "In both?", "label": label}
        for i, label in enumerate(labels)
    ]


@pytest.fixture
def folder(tmp_path):
    for group in mihbench.GROUPS:
        write_lines(tmp_path / "MIHBench" / f"{group}.jsonl", rows(["yes", "no"]))
    return tmp_path


def test_all_kinds(folder):
    questions = mihbench.read(Data(folder), get("mihbench"))
    assert [q.group for q in questions[::2]] == list(mihbench.GROUPS)
    assert [image.name for image in questions[0].images] == ["0a.jpg", "0b.jpg"]
    scores = mihbench.score(questions, {q.key: "Yes." for q in questions}, get("mihbench"))
    found = scores.values()
    assert found["accuracy"] == found["mean: accuracy"] == found["count: precision"] == 0.5
    assert found["identity: recall"] == found["mean: yes ratio"] == 1.0
    assert scores.units == ("0a.jpg+0b.jpg", "1a.jpg+1b.jpg")


def test_words_and_yes_no_mixed(tmp_path):
    listed = [
        {"question_id": 1, "images": ["a.jpg"], "kind": "which", "text": "Which?", "label": "second"},
        {"question_id": 2, "images": ["a.jpg"], "kind": "which", "text": "Which?", "label": "cat"},
        {"question_id": 3, "image": "a.jpg", "kind": "there", "text": "Is it?", "label": "Yes"},
        {"question_id": 4, "image": "a.jpg", "kind": "there", "text": "Is it?", "label": "No"},
    ]
    protocol = get("mihbench/short")
    data = Data(tmp_path, write_lines(tmp_path / "mixed.jsonl", listed))
    questions = mihbench.read(data, protocol)
    said = dict(
        zip((q.key for q in questions), ["The first", "A cat.", "yes", "both yes and no"], strict=True)
    )
    scores = mihbench.score(questions, said, protocol)
    assert scores.values()["accuracy"] == 0.5
    assert scores.values()["which: accuracy"] == 0.5
    assert scores.values()["there: unparsed"] == 0.5
    assert scores.notes["unparsed"] == 1


def test_missing_and_bad(folder):
    (folder / "MIHBench" / "count.jsonl").unlink()
    with pytest.raises(LVLMError, match="MIHBench count is missing: no file count.jsonl or"):
        mihbench.read(Data(folder), get("mihbench"))
    with pytest.raises(LVLMError, match="no kind 'smell'"):
        mihbench.read(Data(folder, groups=("smell",)), get("mihbench"))
    path = write_lines(folder / "q.jsonl", rows(["yes"]) * 2)
    with pytest.raises(LVLMError, match="id q 0 occurs twice"):
        mihbench.read(Data(folder, path), get("mihbench"))
    path = write_lines(folder / "q.jsonl", rows(["yes"]))
    with pytest.raises(LVLMError, match="image '0a.jpg' of mihbench/strict is missing"):
        mihbench.read(Data(folder, path), get("mihbench"), need_images=True)
