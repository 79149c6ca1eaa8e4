"""The examples in the documentation do what is said of them."""

import re
from pathlib import Path

import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.methods import registry as known
from tests import small

pytestmark = pytest.mark.full_compiler  # what readers would see

ROOT = Path(__file__).parents[1]


def block_with(word: str, document: str = "README.md") -> str:
    """A document's one Python block that holds a word."""
    text = (ROOT / document).read_text()
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if word in block]
    return block


@pytest.fixture
def registry():
    """Methods registered by a test are forgotten after it."""
    before = dict(known._REGISTRY)
    yield
    known._REGISTRY.clear()
    known._REGISTRY.update(before)


def test_the_method_example_runs_and_is_what_its_words_say(model, registry):
    question = small.conversation("What?", seed=1)
    names = {"model": model, "question": question}
    exec(block_with("class Dim"), names)
    assert len(names["out"].tokens) == 1
    dim = methods.get("dim")

    def first_logits(method):
        return np.asarray(model.prefill([question], method)[1].combined)

    np.testing.assert_array_equal(first_logits(dim(kappa=0.0)), first_logits(None))
    assert np.abs(first_logits(dim(kappa=0.9)) - first_logits(None)).max() > 1e-3
    assert list(dim().layers(9)) == [3, 4, 5]


def test_the_first_example_runs(model, monkeypatch, tmp_path, capsys):
    from PIL import Image

    Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save(tmp_path / "kitchen.jpg")
    monkeypatch.chdir(tmp_path)
    code = block_with("from_pretrained")
    # The small checkpoint in place of the one to download, whose context is short.
    code = re.sub(r"LVLM\.from_pretrained\(.*?\)", "small_model", code).replace("128", "4")
    exec(code, {"small_model": model})
    assert len(capsys.readouterr().out.splitlines()) >= 2
