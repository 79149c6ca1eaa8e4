"""Sweeps: points of a grid, questions from a file, answers beside greedy ones, the table, and the command's faults."""

import functools
import json
from types import SimpleNamespace

import pytest
from PIL import Image

from lvlm_jax.cli import sweep
from lvlm_jax.evaluation import grid
from lvlm_jax.methods import CMAC
from tests.cli.command import run
from tests.evaluation.builders import write_lines
from tests.refusals import refused


class Model:
    """Answers "No" without a method, and "Yes, it is" if alpha is above 1; a token is a word."""

    def __init__(self):
        self.calls = []

    def _output(self, messages, text):
        return SimpleNamespace(text=[text] * len(messages), tokens=[text.split()] * len(messages))

    def generate(self, messages, max_new_tokens):
        self.calls.append(("greedy", len(messages)))
        return self._output(messages, "No")

    def sweep(self, messages, settings, max_new_tokens):
        self.calls.append((len(settings), len(messages)))
        return [self._output(messages, "Yes, it is" if one.alpha > 1 else "No") for one in settings]


@pytest.fixture
def questions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    row = {"image": "a.png", "text": "Is it?"}
    labels = enumerate(("Yes", "no", "yes"))
    return write_lines(tmp_path / "q.jsonl", [row | {"question_id": f"q{n}", "label": label} for n, label in labels])


def test_points_are_the_product_of_the_axes():
    found = grid.points(CMAC(), ["alpha=0,1.5", "gamma=1,2"])
    assert found == [{"alpha": a, "gamma": g} for a in (0.0, 1.5) for g in (1.0, 2.0)]
    for axis, message in (
        ("omega=1", "CMAC has no strength 'omega'; expected one of alpha"),
        ("alpha=1,x", "expected numbers, as in alpha=0,0.5,1"),
        ("alpha", "expected numbers"),
        ("beta=-1", "beta"),
    ):
        refused(message, grid.points, CMAC(), [axis])


def test_answers_and_their_table(questions, tmp_path):
    asked = grid.of_file(str(questions), str(tmp_path))
    assert [(one.id, one.label) for one in asked] == [("q0", "yes"), ("q1", "no"), ("q2", "yes")]
    points, model = grid.points(CMAC(), ["alpha=1,2,3"]), Model()
    found = grid.answer(model, asked, CMAC(), points, batch_size=2, points_at_once=2, max_new_tokens=4)
    assert model.calls == [("greedy", 2), (2, 2), (1, 2), ("greedy", 1), (2, 1), (1, 1)]
    assert found.texts == [["No"] * 3, ["Yes, it is"] * 3, ["Yes, it is"] * 3]
    assert grid.table(asked, points, found).splitlines() == [
        "settings  changed  tokens  accuracy",
        "greedy                     0.333",
        "alpha=1   0.000    1.0     0.333",
        "alpha=2   1.000    3.0     0.667",
        "alpha=3   1.000    3.0     0.667",
        "questions 3, images 1",
    ]
    grid.write(tmp_path / "out.jsonl", asked, points, found)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows[3] == {"settings": {"alpha": 2.0}, "question_id": "q0", "text": "Yes, it is"} and len(rows) == 9
    unlabelled = grid.of_prompts(["Is it?"], ["a.png"])  # without labels there is no accuracy
    table = grid.table(unlabelled, [{"alpha": 1.0}], grid.Answers(["No"], [["No"]], [[1]]))
    assert table.splitlines()[0] == "settings  changed  tokens"


def test_the_command(questions, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep.LVLM, "from_pretrained", lambda path, **options: Model())
    command = functools.partial(run, monkeypatch, capsys, "sweep")
    words = ("--method", "cmac", "--gamma", 1, "--question-file", questions, "--limit", 2)
    code, out, error = command(*words, "--grid", "alpha=0,4", "--out", "out.jsonl")
    assert (code, error) == (0, "") and "alpha=4   1.000    3.0     0.500" in out.splitlines()
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 4
    for wrong, message in (
        (("--method", "none", "--grid", "alpha=1", "--prompt", "a"), "no strengths to sweep"),
        (("--method", "cmac", "--grid", "alpha=1"), "nothing to ask"),
        (("--method", "cmac", "--prompt", "a"), "--grid"),
        ((*words, "--grid", "alpha=x"), "expected numbers"),
    ):
        code, _, error = command(*wrong)
        assert code == 2 and message in error and error.count("\n") == 1 and error.startswith("lvlm sweep: ")
