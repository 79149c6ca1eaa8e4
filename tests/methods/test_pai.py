"""PAI through the public face against its NumPy reference."""

import numpy as np
import pytest

from lvlm_jax.methods.pai import PAI
from tests.methods import compare
from tests.methods.compare import EDGES, MIXED
from tests.reference import pai


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({}, {}),
        ({"alpha": 0.9, "gamma": 1.7, "beta": 0.3}, {"alpha": 0.9, "gamma": 1.7, "beta": 0.3}),
        ({"layers": (1, 3)}, {"layers": (1, 3)}),
        ({"layers": (0, 1)}, {"start_layer": 0.0, "end_layer": 0.5}),
    ],
    ids=["default", "strong", "layers", "range"],
)
def test_equals_the_reference(settings, fields):
    method = PAI(**fields)
    compare.assert_contrastive(compare.load(4, "bare"), method, pai.run, 1 + 2 * float(method.gamma), MIXED, **settings)


def test_images_at_the_edges_of_the_prompt():
    compare.assert_contrastive(compare.load(4, "bare"), PAI(), pai.run, 3, EDGES)


def test_the_edit_moves_the_main_branch_and_neutral_strengths_do_not():
    case = compare.load(4, "bare")
    plain = case.library(MIXED, None)[0]
    change = np.abs(case.library(MIXED, PAI())[0] - plain).max(axis=-1)
    assert change[0].min() > 0.01 and change[2].min() > 0.01 and change[1].max() < 1e-5
    neutral, _, combined = case.library(MIXED, PAI(alpha=0, gamma=1, beta=1e-30))
    np.testing.assert_allclose(neutral, plain, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(combined.argmax(-1), plain.argmax(-1))
