"""EAH against the NumPy reference."""

import pytest

from lvlm_jax.methods.eah import EAH
from tests.checkpoints import IMAGE
from tests.methods import compare
from tests.methods.compare import EDGES, MIXED
from tests.reference import eah

DEPTH = 3


def check(layouts, variety="qwen2_tied_two_feature_layers", **settings):
    settings = {"layer": 1, **settings}
    references = compare.assert_one_branch(
        compare.load(DEPTH, variety), layouts, EAH(**settings), lambda: eah.Eah(**settings)
    )
    # Heads differ, so that the choice among them matters.
    assert any(len(set(reference.sinks)) > 1 for reference in references)
    return references


def best_heads(references):
    """h* of the samples with an image; None where nothing happened."""
    heads = [reference.sinks.index(max(reference.sinks)) for reference in references]
    return [head if reference.applied else None for head, reference in zip(heads, references, strict=True)]


@pytest.mark.parametrize(
    ("beta", "heads"), [(0.02, [0, None, 2]), (0.05, [0, None, 3]), (0.12, [0, None, 0]), (0.2, [None, None, 3])]
)
def test_paper(beta, heads):
    """The last sample has a tie at 0.12; the first has no sinks at 0.2."""
    assert best_heads(check(MIXED, beta=beta)) == heads


@pytest.mark.parametrize(
    ("beta", "heads"), [(0.015, [1, None, None]), (0.06, [None, None, 3]), (0.12, [None, None, 2])]
)
def test_code(beta, heads):
    """Where nothing happens to a sample with images, head 0 is its best."""
    assert best_heads(check(MIXED, beta=beta, variant="code")) == heads


def test_layer_zero():
    check(MIXED, beta=0.05, layer=0)


def test_head_zero_counts_in_the_paper_only():
    """With a vanishing β all heads tie, the first is taken, and the code then does nothing."""
    model = compare.load(DEPTH)
    compare.assert_one_branch(model, MIXED, EAH(beta=0.0), lambda: eah.Eah(beta=0.0, layer=1))
    compare.assert_plain(model, MIXED, EAH(beta=0.0, layer=1, variant="code"))


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_images_at_the_edges_of_the_prompt(variant):
    check(EDGES, beta=0.05, variant=variant)


def test_sliding_window():
    check([(4, IMAGE, 3, IMAGE, 6), (3, IMAGE, 11)], variety="mistral_window", beta=0.06)


def test_defaults():
    paper, code = EAH(), EAH(variant="code")
    assert float(paper.beta) == pytest.approx(0.002) and float(code.beta) == pytest.approx(0.0008)
    assert [layer for layer in range(32) if paper.active(layer, 32, "prefill")] == [1]
    assert [layer for layer in range(32) if code.active(layer, 32, "prefill")] == [15]
    assert [layer for layer in range(32) if EAH(layer=0.5).active(layer, 32, "prefill")] == [16]
    assert not any(paper.active(layer, 32, "decode") for layer in range(32))
