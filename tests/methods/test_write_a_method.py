"""docs/write_a_method.md: its methods are what is said of them, and its commands run in an empty folder of a user's."""

import re
from pathlib import Path

import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.methods import registry
from tests import small

PAGE = Path(__file__).parents[2] / "docs" / "write_a_method.md"


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
