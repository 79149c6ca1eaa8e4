"""The pocket world's balanced questions: accuracy, a blind constant, margins."""

import json

import numpy as np
import pytest

from lvlm_jax.evaluation import BENCHMARKS, Data, get, margins, rescore
from tests.evaluation.builders import read, scored, write_lines, write_pictures
from tests.refusals import refused

PROTOCOLS = ["pocket/multi-image", "pocket/question-first"]
ROWS = [
    ("which_image", "second", ["second", "first"], "ab"),
    ("which_image", "first", ["first", "second"], "ab"),
    ("which_image", "second", ["second", "first", "third"], "cde"),
    ("same_object", "Yes", ["Yes", "No"], "ab"),
    ("same_place", "No", ["No", "Yes"], "ab"),
]
SAID = ["Second.", "second", "the second", "yes", "Yes"]


def sample(folder):
    rows = [
        {"question_id": i + 1, "images": [f"{name}.png" for name in images], "kind": kind, "text": f"{i}?",
         "label": label, "options": options}
        for i, (kind, label, options, images) in enumerate(ROWS)
    ]  # fmt: skip
    write_lines(folder / "questions" / "balanced.jsonl", rows)
    write_pictures(folder / "images", *(f"{name}.png" for name in "abcde"))
    return Data(folder)


def test_a_constant_stands_beside_the_accuracy(tmp_path):
    sample(tmp_path)
    questions = read("pocket/multi-image", tmp_path, need_images=True)
    assert [question.group for question in questions] == ["which_image"] * 3 + ["same_object"]
    assert get("pocket/multi-image").prompt(questions[2]).startswith("2?\nAnswer the question")
    assert get("pocket/question-first").prompt(questions[2]).startswith("2?<image><image><image>\nAnswer")
    found, scores = scored("pocket/multi-image", questions, SAID[:4])
    assert found["accuracy"] == found["blind constant"] == 3 / 4 and found["over blind"] == 0
    assert found["which_image: accuracy"] == pytest.approx(2 / 3) == found["which_image: blind constant"]
    assert scores.notes["constants"] == {"which_image": "second", "same_object": "Yes"} and "margin" not in found
    assert scores.units == ("a.png+b.png", "c.png+d.png+e.png")


def test_margins_lie_beside_the_answers(tmp_path):
    """Differences of two runs are those of their margins too; a run without margins has accuracy alone."""
    data, benchmark, protocol = sample(tmp_path), BENCHMARKS["pocket"], get("pocket/question-first")
    questions = benchmark.read(data, protocol)
    paths = []
    for name, change in (("one", 1.0), ("other", 0.25), ("none", None)):
        texts = {question.key: said for question, said in zip(questions, SAID, strict=True)}
        paths += benchmark.answers.write(tmp_path / name / "answers.jsonl", questions, texts, protocol)
        if change:
            known = {question.key: {"margin": change * (place - 1)} for place, question in enumerate(questions)}
            margins.write(tmp_path / name, known)
    one, other, none = map(str, paths)
    found = rescore.rescore(protocol, data, [one], [other], resamples=50)
    figures, against = found["figures"], found["against"]["differences"]
    assert figures["margin"]["value"] == pytest.approx(1000) and figures["margin"]["n"] == 5
    assert figures["right is likeliest"]["value"] == pytest.approx(3 / 5)
    assert figures["which_image: margin"]["value"] == pytest.approx(0) and against["margin"]["value"] == pytest.approx(
        750
    )
    assert "margin" in found["against"]["verdicts"] or found["against"]["words"] == ""
    assert not any("margin" in name for name in rescore.rescore(protocol, data, [none], [one], resamples=50)["figures"])
    rows = [json.loads(line) for line in (tmp_path / "one" / margins.FILE).read_text().splitlines()]
    for value, message in (("much", "margin is 'much'; expected a number"), (np.inf, "expected a number")):
        write_lines(tmp_path / "one" / margins.FILE, [rows[0] | {"margin": value}])
        refused(message, rescore.rescore, protocol, data, [one])


def test_questions_that_cannot_be(tmp_path):
    refused("lvlm pocket-world --out DIR --balanced", read, "pocket", tmp_path)
    data = sample(tmp_path)
    path = tmp_path / "questions" / "balanced.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for change, message in (
        ({"options": ["first", "second"]}, "expected the label 'second', then other answers"),
        ({"options": ["second"]}, "expected the label 'second'"),
        ({"images": [1]}, "images and options are lists of strings"),
        ({"question_id": 2}, "id 2 occurs twice"),
        ({"label": 3}, "label is 3; expected a string"),
    ):
        write_lines(path, [rows[0] | change, *rows[1:]])
        refused(message, read, "pocket", tmp_path)
    write_lines(path, rows[4:])
    refused("has no question of the kinds which_image", read, "pocket", tmp_path)
    assert data.folder == tmp_path
