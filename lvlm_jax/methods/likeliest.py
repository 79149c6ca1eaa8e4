"""Chooses the likeliest tokens of a vocabulary without sorting it.

A sort of a vocabulary takes longer on a CPU than a small decoder's step. Here the lowest chosen score is found bit by
bit: 32 sums over the vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from lvlm_jax.methods.base import Strength

_SIGN = np.uint32(1 << 31)


def likeliest(
    scores: Float[Array, "*B V"], weights: Float[Array, "*B V"], enough: Strength, most: Strength | np.integer
) -> Bool[Array, "*B V"]:
    """Marks tokens from the highest score down until their weights sum to `enough`: at least one, at most `most`.

    On ties the lower id comes first.

    Args:
        weights: not negative, and equal for equal scores.
        enough: sum of weights that suffices; infinity for no such limit.
        most: largest number of marked tokens.
    """
    scores, weights = jax.lax.stop_gradient((scores, weights))
    keys = _ordered(scores)
    enough = jnp.maximum(enough, jnp.finfo(jnp.float32).tiny)

    def before(lowest: UInt32[Array, "*B 1"]) -> tuple[jax.Array, jax.Array]:
        """Weight and number of the tokens above a key."""
        above = keys > lowest
        return jnp.where(above, weights, 0).sum(-1, keepdims=True), above.sum(-1, keepdims=True)

    def set_bit(place: jax.Array, lowest: jax.Array) -> jax.Array:
        higher = lowest | (_SIGN >> place.astype(jnp.uint32))
        weight, count = before(higher - 1)
        return jnp.where((weight < enough) & (count < most), lowest, higher)

    # The lowest chosen key is the smallest key such that the tokens above it do not yet suffice.
    lowest = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros_like(keys[..., :1]))
    weight, count = before(lowest)
    tied = keys == lowest
    rank = jnp.cumsum(tied, axis=-1) - 1
    first = (weight + rank * weights < enough) & (count + rank < most)
    return (keys > lowest) | (tied & first)


def _ordered(scores: Float[Array, "*B V"]) -> UInt32[Array, "*B V"]:
    """Integers in the order of the scores."""
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0, scores).astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >= _SIGN, ~bits, bits | _SIGN)
