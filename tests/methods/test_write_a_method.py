"""docs/write_a_method.md: its methods are what is said of them, and its commands run in an empty folder of a user's."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.cli import attention, evaluate, infer, plan, sweep
from lvlm_jax.methods import registry
from lvlm_jax.pocket import splits
from lvlm_jax.weights import names
from tests import small

PAGE = Path(__file__).parents[2] / "docs" / "write_a_method.md"
SAMPLE = str(names.pocket_file("sample.png"))


def blocks(word):
    """The Python blocks of the page that hold a word."""
    return [block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if word in block]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with nothing in it but the page's files. What they register is forgotten after the test."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    for name in ("lift", "doubt"):
        (block,) = blocks(f"class {name.title()}")
        assert f"`{name}.py`" in PAGE.read_text()
        (tmp_path / f"{name}.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_methods_are_what_is_said_of_them(folder, model):
    lift, doubt = methods.get("lift.py:Lift"), methods.get("doubt:Doubt")
    question = small.conversation("What?", seed=1)
    given = {"model": model, "question": question, "methods": methods, "Lift": lift, "Doubt": doubt}
    for block in blocks("model.generate"):
        exec(block, given)
    assert given["lifted"].tokens == given["same"].tokens and given["both"].tokens

    def first_logits(method):
        return np.asarray(model.prefill([question], method)[1].combined)

    plain = first_logits(None)
    for nothing in (lift(delta=0.0), doubt(alpha=0.0)):
        np.testing.assert_allclose(first_logits(nothing), plain, rtol=0, atol=1e-5)
    for strong in (lift(delta=5.0), doubt(alpha=5.0), methods.chain(lift(delta=5.0), doubt())):
        assert np.abs(first_logits(strong) - plain).max() > 1e-3


def run(command, *words):
    """A command with an image and few tokens, as `lvlm` runs it."""
    assert command.main([*map(str, words), "--max-new-tokens", "4"]) == 0


@pytest.mark.parametrize("name", ["lift.py:Lift", "lift:Lift"])
def test_infer_takes_a_class_of_the_folder(folder, capsys, name):
    asked = ["--image", SAMPLE, "--prompt", "What is this?"]
    run(infer, *asked, "--method", name, "--delta", "8")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  Lift ") for line in lines)
    run(infer, *asked, "--method", f"{name}+doubt.py:Doubt", "--lift-delta", "8", "--alpha", "2")
    assert "  Lift + Doubt  " in capsys.readouterr().out


def test_sweep_attention_and_plan_take_it(folder, capsys):
    asked = ["--image", SAMPLE, "--prompt", "What is this?"]
    run(sweep, *asked, "--method", "lift.py:Lift", "--grid", "delta=0,8")
    assert re.search(r"^delta=0 +0\.000", capsys.readouterr().out, re.M)
    run(attention, *asked, "--method", "lift:Lift", "--compare", "doubt.py:Doubt", "--out", "looked")
    page = (folder / "looked" / "index.html").read_text()
    assert "Lift" in page and "Doubt" in page
    assert infer.command_line([*asked, "--method", "lift:Lift", "--delta", "2"]).method.delta == 2
    assert plan.command_line(["7b", "--method", "lift:Lift"]).method.label == "Lift"


def test_evaluate_takes_it(folder):
    splits.write_split(folder / "world", "test", 12)
    run(evaluate, "--protocol", "pope/pocket", "--data", "world", "--group", "random", "--model", "pocket",
        "--method", "lift.py:Lift", "--delta", "8", "--out", "scored")  # fmt: skip
    scores = json.loads((folder / "scored" / "scores.json").read_text())
    assert "'name': 'Lift'" in str(scores) and "8.0" in str(scores)
