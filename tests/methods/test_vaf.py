"""VAF against the NumPy reference."""

import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.methods.vaf import VAF
from tests.methods import one_branch
from tests.methods.one_branch import EDGES, MIXED
from tests.reference import vaf

DEPTH = 4


@pytest.mark.parametrize("layouts", [MIXED, EDGES], ids=["mixed", "edges"])
@pytest.mark.parametrize("factors", [{}, {"enhance": 1.6, "suppress": 0.3}], ids=["published", "strong"])
def test_equals_the_reference(layouts, factors):
    one_branch.assert_equal_to_reference(
        one_branch.load(DEPTH),
        layouts,
        VAF(start_layer=1, end_layer=3, **factors),
        lambda: vaf.Vaf(layers=(1, 2), **factors),
    )


def test_sliding_window():
    one_branch.assert_equal_to_reference(
        one_branch.load(3, "mistral_window"),
        MIXED,
        VAF(layers=(0, 2), enhance=1.5),
        lambda: vaf.Vaf(layers=(0, 2), enhance=1.5),
    )


def test_factors_of_one_change_nothing():
    one_branch.assert_plain(one_branch.load(DEPTH), MIXED, VAF(start_layer=0, enhance=1.0, suppress=1.0))


def test_default_layers():
    method = VAF()
    for phase in ("prefill", "decode"):
        assert [layer for layer in range(32) if method.active(layer, 32, phase)] == [9, 10, 11, 12, 13, 14]
    with pytest.raises(LVLMError, match="9 to 15"):
        method.active(0, DEPTH, "prefill")
