"""Middle layers against the NumPy reference."""

import pytest

from lvlm_jax.methods.middle_layers import MiddleLayers
from tests.methods import one_branch
from tests.methods.one_branch import EDGES, MIXED
from tests.reference import middle_layers

DEPTH = 4


@pytest.mark.parametrize("layouts", [MIXED, EDGES], ids=["mixed", "edges"])
@pytest.mark.parametrize("alpha", [0.5, 1.5])
def test_equals_the_reference(layouts, alpha):
    one_branch.assert_equal_to_reference(
        one_branch.load(DEPTH),
        layouts,
        MiddleLayers(start_layer=1, end_layer=3, alpha=alpha),
        lambda: middle_layers.MiddleLayers(layers=(1, 2), alpha=alpha),
    )


def test_sliding_window():
    one_branch.assert_equal_to_reference(
        one_branch.load(3, "mistral_window"),
        MIXED,
        MiddleLayers(layers=(0, 2)),
        lambda: middle_layers.MiddleLayers(layers=(0, 2)),
    )


def test_alpha_zero_changes_nothing():
    one_branch.assert_plain(one_branch.load(DEPTH), MIXED, MiddleLayers(start_layer=0, alpha=0.0))


def test_default_layers():
    method = MiddleLayers()
    for phase in ("prefill", "decode"):
        active = [layer for layer in range(32) if method.active(layer, 32, phase)]
        assert active == list(range(5, 19))
