"""Middle layers against the NumPy reference."""

import pytest

from lvlm_jax.methods.middle_layers import MiddleLayers
from tests.methods import compare
from tests.reference import middle_layers


@pytest.mark.parametrize("alpha", [0.5, 1.5])
@pytest.mark.parametrize(("case", "layouts", "layers"), compare.UPPER, ids=["mixed", "edges", "window"])
def test_equals_the_reference(case, layouts, layers, alpha):
    method = MiddleLayers(**layers, alpha=alpha)
    compare.assert_one_branch(
        compare.load(*case), layouts, method, lambda: middle_layers.MiddleLayers(layers=(1, 2), alpha=alpha)
    )


def test_default_layers():
    method = MiddleLayers()
    for phase in ("prefill", "decode"):
        active = [layer for layer in range(32) if method.active(layer, 32, phase)]
        assert active == list(range(5, 19))
