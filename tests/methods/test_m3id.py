"""M3ID through the public face against its NumPy reference."""

import numpy as np
import pytest

from lvlm_jax.methods.m3id import M3ID
from tests.methods import compare
from tests.methods.compare import EDGES, MIXED
from tests.reference import m3id
from tests.reference.branch import log_softmax

GATED = {"decay": 0.2, "alpha_gate": 0.3}


@pytest.mark.parametrize(
    "settings",
    [{}, GATED, {"variant": "port"}, {"variant": "port", "decay": 0.2, "beta": 0.3}],
    ids=["default", "gated", "port", "strong port"],
)
@pytest.mark.parametrize("layouts", [MIXED, EDGES], ids=["mixed", "edges"])
def test_equals_the_reference(settings, layouts):
    factor = 1 + 2 * (np.exp(settings.get("decay", 0.02) * compare.STEPS) - 1)
    cuts = settings.get("variant") == "port"
    compare.assert_contrastive(compare.load(2, "bare"), M3ID(**settings), m3id.run, factor, layouts, cuts, **settings)


def test_sure_tokens_are_left_alone():
    """The paper's gate is met open and closed; where it is closed the logits are the main ones."""
    case = compare.load(2, "bare")
    main, contrast, combined = case.library(MIXED, M3ID(**GATED))
    probabilities = np.exp(log_softmax(main))
    closed = probabilities.max(axis=-1) >= GATED["alpha_gate"]
    closed[:, 0] = True  # where the factor is 0
    closed[1] = True  # the sample without an image
    np.testing.assert_array_equal(combined[closed], main[closed])
    assert (np.abs(combined - main).max(axis=-1)[~closed] > 0.01).all()
    assert closed[:, 1:].any() and not closed.all()


def test_presets():
    assert M3ID.preset("paper").variant == M3ID().variant == "paper"
    assert M3ID.preset("port").variant == "port" and float(M3ID.preset("port").beta) == np.float32(0.1)


def test_the_contrast_grows_from_nothing():
    """At the first token only the cut is left; later ones move further and further from the main logits."""
    case = compare.load(2, "bare")
    main, contrast, combined = case.library(MIXED, M3ID(decay=0.1, variant="port"))
    kept = np.isfinite(combined)
    np.testing.assert_array_equal(combined[:, 0][kept[:, 0]], main[:, 0][kept[:, 0]])
    for step in range(1, compare.STEPS + 1):
        moved, apart = combined[0, step] - main[0, step], main[0, step] - contrast[0, step]
        share = moved[kept[0, step]] / apart[kept[0, step]]
        np.testing.assert_allclose(share, np.expm1(0.1 * step), rtol=1e-2)


@pytest.mark.parametrize("variant", ["paper", "port"])
def test_very_long_answers_stay_finite(variant):
    case = compare.load(2, "bare")
    _, _, combined = case.library(MIXED, M3ID(decay=1000.0, variant=variant))
    assert not np.isnan(combined).any() and np.isfinite(combined).any(axis=-1).all()
