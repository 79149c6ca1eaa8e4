"""VAF against the NumPy reference."""

import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.methods.vaf import VAF
from tests.methods import compare
from tests.reference import vaf


@pytest.mark.parametrize("factors", [{}, {"enhance": 1.6, "suppress": 0.3}], ids=["published", "strong"])
@pytest.mark.parametrize(("case", "layouts", "layers"), compare.UPPER, ids=["mixed", "edges", "window"])
def test_equals_the_reference(case, layouts, layers, factors):
    method = VAF(**layers, **factors)
    compare.assert_one_branch(compare.load(*case), layouts, method, lambda: vaf.Vaf(layers=(1, 2), **factors))


def test_default_layers():
    method = VAF()
    for phase in ("prefill", "decode"):
        assert [layer for layer in range(32) if method.active(layer, 32, phase)] == [9, 10, 11, 12, 13, 14]
    with pytest.raises(LVLMError, match="9 to 15"):
        method.active(0, 4, "prefill")
