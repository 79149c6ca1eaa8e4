"""Our reconstruction of CLVA against the NumPy reference."""

import jax
import numpy as np
import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.methods.clva import CLVA
from tests.methods import compare
from tests.methods.compare import EDGES, MIXED
from tests.reference import clva

DEPTH = 7  # noise 0 to 2, candidates 3 and 4, edits 5 and 6


def check(layouts, depth=DEPTH, variety="qwen2_tied_two_feature_layers", **settings):
    exact = {**settings, "rho": settings.get("rho", "0.1")}
    given = {**settings, "rho": float(exact["rho"])}
    return compare.assert_one_branch(compare.load(depth, variety), layouts, CLVA(**given), lambda: clva.Clva(**exact))


def test_equals_the_reference():
    references = check(MIXED, rho="0.3")
    assert set().union(*(reference.anchor_layers for reference in references)) == {3, 4}
    drifts = [drift for reference in references for drift in reference.drifts]
    assert min(drifts) == 0 and max(drifts) > 0.2


@pytest.mark.parametrize(
    "settings",
    [{"gate": False}, {"a": 0.0, "gate": False}, {"b": 0.0}, {"lambda_": 0.4, "rho": "0.7", "a": 3.0}],
    ids=["no_gate", "no_anchors", "no_suppression", "strong"],
)
def test_ablations(settings):
    check(MIXED, **settings)


def test_images_at_the_edges_of_the_prompt():
    check(EDGES, rho="0.5", a=2.0)


def test_sliding_window():
    """Decoding leaves the images behind: one that the row no longer sees is left alone."""
    check(MIXED, variety="mistral_window", rho="0.5", a=2.0)


def test_where_noise_and_candidates_overlap():
    """Four layers: noise 0 to 2, candidate 2, edit 3."""
    check(MIXED, depth=4, rho="0.3", a=2.0)


def test_layers():
    method = CLVA()
    assert list(method.candidates(32)) == list(range(10, 20)) and method.edited(32) == tuple(range(21, 32))
    assert list(method.candidates(10)) == [3, 4, 5, 6] and method.edited(10) == (7, 8, 9)
    assert list(method.candidates(40)) == list(range(12, 25)) and method.edited(40) == tuple(range(26, 40))
    active = [layer for layer in range(32) if method.active(layer, 32, "decode")]
    assert active == [0, 1, 2, *range(10, 20), *range(21, 32)]


@pytest.mark.parametrize(("method", "depth"), [(CLVA(), 3), (CLVA(start_layer=12), 32)])
def test_layers_in_the_wrong_order_are_refused(method, depth):
    with pytest.raises(LVLMError, match="CLVA in"):
        method.active(0, depth, "prefill")


def test_gradients_are_finite():
    """Also where a map is zero: samples without an image, images without anchors."""
    case = compare.load(DEPTH)
    ours, prepared = case.ours, case.ours.prepare(case.inputs(MIXED[:2]))

    def total(method):
        return (ours.logits(prepared, method=method)[:, -1] ** 2).sum()

    gradients = jax.grad(total, allow_int=True)(CLVA(rho=0.3))
    values = [np.asarray(leaf) for leaf in jax.tree.leaves(gradients)]
    assert all(np.isfinite(value).all() for value in values) and np.abs(gradients.a) > 0
