"""A tree in two parts and back."""

import jax
import jax.numpy as jnp
import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.weights import parts
from lvlm_jax.weights.tables import flatten

PARAMS = {
    "connector": {"linear_1": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}},
    "language_model": {"layers_0": {"up_proj": {"kernel": jnp.full((3, 4), 2.0)}}, "norm": {"scale": jnp.ones(3)}},
}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("^connector/", {"connector/linear_1/kernel", "connector/linear_1/bias"}),
        ("kernel$", {"connector/linear_1/kernel", "language_model/layers_0/up_proj/kernel"}),
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


def test_gradients_are_of_the_trained_part_alone():
    trainable, frozen = parts.split(PARAMS, "up_proj")

    @jax.jit
    def gradient(trainable, frozen):
        def loss(trainable):
            params = parts.join(trainable, frozen)
            first = params["connector"]["linear_1"]["kernel"]
            return (first @ params["language_model"]["layers_0"]["up_proj"]["kernel"]).sum()

        return jax.grad(loss)(trainable)

    found = flatten(gradient(trainable, frozen))
    assert set(found) == {"language_model/layers_0/up_proj/kernel"}
    assert jnp.array_equal(found["language_model/layers_0/up_proj/kernel"], jnp.full((3, 4), 2.0))


def test_parts_that_overlap():
    trainable, _ = parts.split(PARAMS, "norm")
    with pytest.raises(ValueError, match="language_model/norm/scale"):
        parts.join(trainable, PARAMS)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("q_proj", "matches nothing"), ("^norm", "matches nothing"), ("(", "not a regular expression")],
)
def test_patterns_that_cannot_be_used(pattern, message):
    with pytest.raises(LVLMError, match=message) as caught:
        parts.split(PARAMS, pattern)
    assert repr(pattern) in str(caught.value) and "\n" not in str(caught.value)
