"""M3ID through the public face against its NumPy reference."""

import numpy as np
import pytest

from lvlm_jax.methods.m3id import M3ID
from tests.methods import compare
from tests.methods.compare import EDGES, MIXED
from tests.reference import m3id


@pytest.mark.parametrize("settings", [{}, {"decay": 0.2, "beta": 0.3}], ids=["default", "strong"])
@pytest.mark.parametrize("layouts", [MIXED, EDGES], ids=["mixed", "edges"])
def test_equals_the_reference(settings, layouts):
    factor = 1 + 2 * (np.exp(settings.get("decay", 0.02) * compare.STEPS) - 1)
    compare.assert_contrastive(
        compare.load(2, "bare"), M3ID(**settings), m3id.run, factor, layouts, **settings
    )


def test_the_contrast_grows_from_nothing():
    """At the first token only the cut is left; later ones move further and further from the main logits."""
    case = compare.load(2, "bare")
    main, contrast, combined = case.library(MIXED, M3ID(decay=0.1))
    kept = np.isfinite(combined)
    np.testing.assert_array_equal(combined[:, 0][kept[:, 0]], main[:, 0][kept[:, 0]])
    for step in range(1, compare.STEPS + 1):
        moved, apart = combined[0, step] - main[0, step], main[0, step] - contrast[0, step]
        share = moved[kept[0, step]] / apart[kept[0, step]]
        np.testing.assert_allclose(share, np.expm1(0.1 * step), rtol=1e-2)


def test_very_long_answers_stay_finite():
    case = compare.load(2, "bare")
    _, _, combined = case.library(MIXED, M3ID(decay=1000.0))
    assert not np.isnan(combined).any() and np.isfinite(combined).any(axis=-1).all()
