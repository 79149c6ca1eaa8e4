"""The report: every prompt is asked once, and each row gets the answer to its own."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from lvlm_jax.pocket import report
from lvlm_jax.pocket.splits import write_split


class Knowing:
    """Answers POPE's questions rightly, about the picture that it is shown."""

    def __init__(self, folder):
        self.asked = []
        self.right = {
            (row["image"], row["text"]): row["label"]
            for path in (folder / "pope").iterdir()
            for row in map(json.loads, path.read_text().splitlines())
        }

    def generate(self, conversations, max_new_tokens):
        assert len(conversations) == 8
        parts = [conversation[0]["content"] for conversation in conversations]
        prompts = [(*(Path(part["image"]).name for part in some[:-1]), some[-1]["text"]) for some in parts]
        self.asked += prompts
        texts = [self.right.get(prompt, "no").capitalize() for prompt in prompts]
        return SimpleNamespace(text=texts, finish_reason=["stop"] * len(texts))


def test_every_prompt_is_asked_once_and_a_model_that_knows_is_right(tmp_path):
    write_split(tmp_path / "split", "test", 24)
    model = Knowing(tmp_path / "split")
    figures = report.pope(report.Examiner(model, tmp_path / "split", 8))
    for strategy in ("random", "popular", "adversarial"):
        assert (
            figures[f"POPE {strategy}: accuracy"]["value"] == 1
            and figures[f"POPE {strategy}: yes share"]["value"] == 0.5
        )
    assert figures["POPE shuffled: accuracy"]["value"] < 0.8
    assert len(set(model.asked)) > len(model.asked) - 8  # the last batch is filled up
    assert set(model.right) <= set(model.asked)
    assert report.examine(model, 24, 8, parts=["pope"]) == figures


def test_questions_without_an_image():
    texts = iter(["It is Paris.", "Rome", "It is green.", "A dog has four legs.", "Shakespeare did."])
    said = {text: next(texts) for text in report.SPOKEN}

    def generate(conversations, max_new_tokens):
        parts = [conversation[0]["content"] for conversation in conversations]
        assert all(len(some) == 1 for some in parts)
        return SimpleNamespace(text=[said[some[0]["text"]] for some in parts], finish_reason=["stop"] * len(parts))

    found = report.spoken(report.Examiner(SimpleNamespace(generate=generate), Path(), 5))
    assert found["questions without an image: answered"]["value"] == pytest.approx(0.8)
