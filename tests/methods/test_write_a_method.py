"""docs/write_a_method.md: its methods do what it says, and its commands run in an empty folder."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.cli import attention, evaluate, infer, plan, pocket_benchmark, sweep
from lvlm_jax.methods import registry
from lvlm_jax.pocket import splits
from lvlm_jax.weights import names
from tests import small
from tests.cli.command import write_small

PAGE = Path(__file__).parents[2] / "docs" / "write_a_method.md"
SAMPLE = str(names.pocket_file("sample.png"))


def blocks(word):
    """The Python blocks of the page that hold a word."""
    return [block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if word in block]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with nothing in it but the page's files. What they register is forgotten after the test."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    for name in ("lift", "doubt", "soften"):
        (block,) = blocks(f"class {name.title()}")
        assert f"`{name}.py`" in PAGE.read_text()
        (tmp_path / f"{name}.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_methods_are_what_is_said_of_them(folder, model):
    lift, doubt, soften = (methods.get(word) for word in ("lift.py:Lift", "doubt:Doubt", "soften.py:Soften"))
    question = small.conversation("What?", seed=1)
    given = {"model": model, "question": question, "methods": methods, "Lift": lift, "Doubt": doubt}
    for block in blocks("model.generate"):
        exec(block, given)
    assert given["lifted"].tokens == given["same"].tokens and given["both"].tokens

    def first_logits(method):
        return np.asarray(model.prefill([question], method)[1].combined)

    plain = first_logits(None)
    for nothing in (lift(delta=0.0), doubt(alpha=0.0), soften(alpha=0.0)):
        np.testing.assert_allclose(first_logits(nothing), plain, rtol=0, atol=1e-5)
    for strong in (lift(delta=5.0), doubt(alpha=5.0), soften(alpha=0.9), methods.chain(lift(delta=5.0), doubt())):
        assert np.abs(first_logits(strong) - plain).max() > 1e-3


@pytest.fixture
def asked(tmp_path_factory):
    """A question to a model of two layers, which compiles sooner; what it says does not matter here."""
    model = write_small(tmp_path_factory.mktemp("models") / "small")
    return ["--model", str(model), "--image", SAMPLE, "--prompt", "What is this?", "--max-new-tokens", "4"]


def test_commands_take_a_class_of_the_folder(folder, asked, capsys):
    words = ["--method", "lift:Lift+doubt.py:Doubt", "--lift-delta", "8", "--alpha", "2"]
    assert infer.main([*asked, *words]) == 0
    assert "\n  Lift + Doubt  " in capsys.readouterr().out
    assert sweep.main([*asked, "--method", "lift.py:Lift", "--grid", "delta=0,8"]) == 0
    assert re.search(r"^delta=0 +0\.000", capsys.readouterr().out, re.M)
    splits.write_split(folder / "world", "test", 12)
    words = ["--protocol", "pope/pocket", "--data", "world", "--group", "random", *asked[:2]]
    assert evaluate.main([*words, "--method", "lift.py:Lift", "--delta", "8", "--out", "scored"]) == 0
    scores = json.loads((folder / "scored" / "scores.json").read_text())
    assert "'name': 'Lift'" in str(scores) and "8.0" in str(scores)


def test_other_commands_take_it(folder):
    compared = attention.command_line(["--method", "lift:Lift", "--compare", "doubt.py:Doubt"]).methods
    assert list(compared) == ["Doubt", "Lift"]
    assert plan.command_line(["7b", "--method", "lift:Lift"]).method.label == "Lift"
    chosen = pocket_benchmark.chosen(["vcd", "lift.py:Lift", "lift:Lift:delta=2"])
    assert list(chosen) == ["vcd", "lift.py-lift", "lift-lift-delta=2"]
    assert [method.label for method in chosen.values()] == ["VCD", "Lift", "Lift"]
