"""A tree in two parts and back."""

import jax
import jax.numpy as jnp
import pytest

from lvlm_jax.weights import parts
from lvlm_jax.weights.tables import flatten
from tests.refusals import refused

PARAMS = {
    "connector": {"linear_1": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}},
    "language_model": {"layers_0": {"up_proj": {"kernel": jnp.full((3, 4), 2.0)}}, "norm": {"scale": jnp.ones(3)}},
}
UP = "language_model/layers_0/up_proj/kernel"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("^connector/", {"connector/linear_1/kernel", "connector/linear_1/bias"}),
        ("kernel$", {"connector/linear_1/kernel", UP}),
        ("", set(flatten(PARAMS))),
    ],
)
def test_the_parts_are_disjoint_and_make_the_whole(pattern, expected):
    trainable, frozen = parts.split(PARAMS, pattern)
    assert set(flatten(trainable)) == expected
    assert set(flatten(frozen)) == set(flatten(PARAMS)) - expected
    joined = parts.join(trainable, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(PARAMS)
    assert all(leaf is flatten(PARAMS)[path] for path, leaf in flatten(joined).items())


def test_patterns_and_parts_that_cannot_be_used():
    for pattern, message in (
        ("q_proj", "matches nothing"),
        ("^norm", "matches nothing"),
        ("(", "not a regular expression"),
    ):
        assert repr(pattern) in refused(message, parts.split, PARAMS, pattern)
    with pytest.raises(ValueError, match="language_model/norm/scale"):
        parts.join(parts.split(PARAMS, "norm")[0], PARAMS)
