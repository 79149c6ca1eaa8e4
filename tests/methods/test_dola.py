"""DoLa through the public face against its NumPy reference."""

import numpy as np
import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.methods.dola import DoLa
from tests.methods import compare
from tests.methods.compare import MIXED
from tests.reference import dola


@pytest.mark.parametrize(
    ("fields", "beta"),
    [
        ({"layers": "low"}, 0.1),
        ({"layers": "high", "variant": "code"}, 0.1),
        ({"layers": "low", "variant": "code"}, 0.02),
        ({"layers": (0, 2, 3, 5)}, 0.5),
    ],
    ids=["low", "high_code", "low_code", "explicit"],
)
def test_equals_the_reference(fields, beta):
    case = compare.load(6, "bare")
    main, contrast, combined = case.library(MIXED, DoLa(beta=beta, **fields))
    assert contrast is None
    exits = dola.buckets(6).get(fields["layers"], fields["layers"])
    settings = {"exits": exits, "beta": beta, "norm": fields.get("variant") != "code"}
    chosen = set()
    for row, want in enumerate(case.references(dola.run, MIXED, **settings)):
        assert want[4] > 1e-5, "a choice of layer is too close; take another seed"
        compare.assert_close(main[row], want[0], f"main {row}")
        compare.assert_combined(combined[row], want[1], want[2], 3, f"combined {row}")
        chosen |= set(want[3])
    if "variant" not in fields:  # without the final norm one exit always wins
        assert len(chosen) > 1, "samples and steps should disagree about the layer"


def test_published_layers():
    assert DoLa(layers="low").exits(32) == (0, 2, 4, 6, 8, 10, 12, 14)
    assert DoLa(layers="high").exits(32) == (16, 18, 20, 22, 24, 26, 28, 30)
    assert DoLa(layers="low").exits(5) == (0, 2) and DoLa(layers="high").exits(5) == (4,)
    for depth in (2, 3, 7, 8, 27, 40):
        expected = dola.buckets(depth)
        assert list(DoLa(layers="low").exits(depth)) == expected["low"]
        if expected["high"]:
            assert list(DoLa(layers="high").exits(depth)) == expected["high"]


def test_impossible_layers_are_refused():
    with pytest.raises(LVLMError, match="'low', 'high'"):
        DoLa(layers="middle")
    with pytest.raises(LVLMError, match="none of this model's 2 layers"):
        DoLa(layers="high").exits(2)
    with pytest.raises(LVLMError, match="variant"):
        DoLa(variant="other")


def test_a_cut_at_the_maximum_leaves_the_greedy_token():
    case = compare.load(6, "bare")
    main, _, combined = case.library(MIXED, DoLa(beta=1.0))
    assert (np.isfinite(combined).sum(axis=-1) == 1).all()
    np.testing.assert_array_equal(combined.argmax(-1), main.argmax(-1))
