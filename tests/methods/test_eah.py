"""EAH against the NumPy reference."""

import pytest

from lvlm_jax.methods.eah import EAH
from tests.checkpoints import IMAGE
from tests.methods import one_branch
from tests.methods.one_branch import EDGES, MIXED
from tests.reference import eah

DEPTH = 3


def check(layouts, variety="qwen2_tied_two_feature_layers", seed=22, **settings):
    settings = {"layer": 1, **settings}
    references = one_branch.assert_equal_to_reference(
        one_branch.load(DEPTH, variety), layouts, EAH(**settings), lambda: eah.Eah(**settings), seed
    )
    # Heads differ, so that the choice among them matters.
    assert any(len(set(reference.sinks)) > 1 for reference in references)
    return references


@pytest.mark.parametrize("layer", [0, 1])
def test_paper(layer):
    references = check(MIXED, beta=0.05, layer=layer)
    assert [reference.applied for reference in references] == [True, False, True]


@pytest.mark.parametrize("seed", [22, 23])
def test_code(seed):
    check(MIXED, beta=0.05, variant="code", seed=seed)


def test_head_zero_counts_in_the_paper_only():
    """With a vanishing β all heads tie, the first is taken, and the code then does nothing."""
    model = one_branch.load(DEPTH)
    one_branch.assert_equal_to_reference(model, MIXED, EAH(beta=0.0), lambda: eah.Eah(beta=0.0, layer=1))
    one_branch.assert_plain(model, MIXED, EAH(beta=0.0, layer=1, variant="code"))


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_images_at_the_edges_of_the_prompt(variant):
    check(EDGES, beta=0.05, variant=variant)


def test_sliding_window():
    check([(4, IMAGE, 3, IMAGE, 6), (3, IMAGE, 11)], variety="mistral_window", beta=0.06)


def test_without_sinks_nothing_changes():
    one_branch.assert_plain(one_branch.load(DEPTH), MIXED, EAH(beta=1.0))


def test_defaults():
    paper, code = EAH(), EAH(variant="code")
    assert float(paper.beta) == pytest.approx(0.002) and float(code.beta) == pytest.approx(0.0008)
    assert [layer for layer in range(32) if paper.active(layer, 32, "prefill")] == [1]
    assert [layer for layer in range(32) if code.active(layer, 32, "prefill")] == [15]
    assert [layer for layer in range(32) if EAH(layer=0.5).active(layer, 32, "prefill")] == [16]
    assert not any(paper.active(layer, 32, "decode") for layer in range(32))
