"""DeCo through the public face against its NumPy reference."""

import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.methods.deco import DeCo, likeliest
from tests.methods import compare
from tests.methods.compare import MIXED
from tests.reference import deco


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({"exits": (2, 3)}, {}),
        ({"exits": (0, 1, 3), "alpha": 2.0, "most": 3},
         {"layers": (0, 1, 3), "alpha": 2.0, "candidates": 3}),
        ({"exits": (0, 1, 2), "top_p": 0.3}, {"start_layer": 0, "end_layer": 3, "top_p": 0.3}),
        ({"exits": (2, 3), "top_p": 1.0, "most": 120},
         {"start_layer": 0.5, "end_layer": None, "top_p": 1.0, "candidates": 120}),
    ],
    ids=["default", "explicit", "range", "all_tokens"],
)  # fmt: skip
def test_equals_the_reference(settings, fields):
    case = compare.load(4, "bare", seed=23)
    main, contrast, combined = case.library(MIXED, DeCo(**fields))
    assert contrast is None
    chosen, counts = set(), set()
    for row, want in enumerate(case.references(deco.run, MIXED, **settings)):
        if settings.get("most") != 120:  # else every token is a candidate, whatever its neighbours
            assert want[4] > 1e-5, "a choice is too close; take another seed"
        compare.assert_close(main[row], want[0], f"main {row}")
        kept = np.isfinite(want[1])
        compare.assert_close(combined[row][kept], want[1][kept], f"combined {row}", 3)
        assert np.isneginf(combined[row][~kept]).all() and kept.sum(axis=-1).tolist() == want[3]
        assert np.abs(combined[row] - main[row])[kept].max() > 0.2
        chosen |= set(want[2])
        counts |= set(want[3])
    assert len(chosen) > 1, "samples and steps should disagree about the layer"
    assert max(counts) <= settings.get("most", 20)
    if not settings.get("most"):
        assert len(counts) > 1


def test_all_tokens_are_candidates_where_the_rest_is_lost_in_rounding():
    probabilities = jnp.asarray([[1.0, 1e-9, 1e-12]])  # 1 + 1e-9 is 1 in float32
    assert likeliest(probabilities, 1.0, 20).all()


def test_published_layers():
    assert DeCo().exits(32) == tuple(range(20, 29))
    assert DeCo().exits(8) == (5, 6) and DeCo().exits(4) == (2, 3) and DeCo().exits(2) == (1,)
    assert DeCo(layers=(3,)).exits(32) == (3,)


@pytest.mark.parametrize(
    ("top_p", "most", "expected"),
    [
        (0.9, 20, [True, True, True, False]),
        (0.8, 20, [True, True, False, False]),
        (0.9, 2, [True, True, False, False]),
        (0.0, 20, [True, False, False, False]),
        (1.0, 1, [True, False, False, False]),
        (1.0, 20, [True, True, True, True]),
        (0.2, 20, [True, False, False, False]),
    ],
)
def test_candidates(top_p, most, expected):
    """Probabilities in another order than the vocabulary's; 0.8 is reached by two tokens, the third is not needed."""
    order = np.array([2, 0, 3, 1])
    probabilities = np.array([[0.5, 0.3125, 0.125, 0.0625]], np.float32)[:, order]
    np.testing.assert_array_equal(likeliest(jnp.asarray(probabilities), top_p, most)[0], np.array(expected)[order])
