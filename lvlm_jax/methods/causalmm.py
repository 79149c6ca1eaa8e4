"""CausalMM: contrast with shuffled attention in the vision tower and in the decoder. arXiv 2410.04780.

With l_v the next-token logits when the tower's attention is shuffled in all its layers, and l_t when the decoder's is,
in all layers and in the rows after the images,

    (1 + 2 γ) l - γ l_v - γ l_t      where l >= max l + ln β        γ 0.5, β 0.1

Shuffling: the n-th column that a row sees gets the weight of the n-th column in a random order, which depends on `seed`
and the layer and is the same for all heads and rows. Places (patches of an image, or tokens of a sample, counted from
0) are sorted by a 32-bit hash: with x = place · 9E3779B1 + (layer + 1) · 85EBCA6B + seed · C2B2AE35 (hexadecimal,
modulo 2³²), the bits of x are mixed by x ^= x >> 16, x *= 7FEB352D, x ^= x >> 15, x *= 846CA68B, x ^= x >> 16.

The shuffled arrays, and one order for all heads, are our reading of the paper. Towers with window attention are
shuffled over the whole image.

Differs from the authors' code in: theirs multiplies the tower's features by a shuffled attention map, reduced to one
number per patch; it draws a new order in every call; it applies only one of the two interventions at a time.

Rows: after the last image, in the third branch. Stage: weights. A sample without an image is left alone.
Cost: the tower twice, two prompts more, and two more rows through the weights per token.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lvlm_jax.attention import Transform
from lvlm_jax.methods.base import Method, Readout, Strength, data, strength
from lvlm_jax.methods.contrast import ImagePresence, where_image
from lvlm_jax.methods.cuts import plausible
from lvlm_jax.methods.registry import register


@register("causalmm")
class CausalMM(Method):
    """Contrast with shuffled attention in tower and decoder; see the module for the formulas."""

    gamma: Strength = strength(0.5, "strength γ of each of the two contrasts", low=0)
    beta: Strength = strength(0.1, "plausibility cut β", low=0, high=1, cuts=True)
    seed: Strength = strength(0, "seed of the shuffling, a whole number", low=0, high=2**24, flat="a seed")
    read: jax.Array | None = data("embeddings from the shuffled tower; set by `after_warm_up`")

    PRESETS: ClassVar = {"default": dict(gamma=0.5, beta=0.1)}
    warm_up_fields: ClassVar[tuple[str, ...]] = ("tower",)

    def branches(self):
        return (ImagePresence(), None, Shuffled(self.seed))

    def contrast_prompt(self) -> str:
        return "tokens"

    def tower_values(self, layer, values, valid):
        """Permutes the values, which equals the inverse permutation of the weights."""
        order = shuffled(jnp.arange(values.shape[1]), layer, self.seed, valid)
        place = jnp.argsort(order, axis=-1)
        return jnp.take_along_axis(values, place[..., None], axis=1)

    def after_warm_up(self, warm_up) -> "CausalMM":
        return dataclasses.replace(self, read=warm_up.tower)

    def contrast_tokens(self, embeddings, image_id):
        return self.read.astype(embeddings.dtype)

    def combine(self, readout: Readout, memory):
        main = readout.main
        contrasted = (1 + 2 * self.gamma) * main - self.gamma * (readout.contrast + readout.later_branches[0])
        return where_image(readout.carry, plausible(contrasted, main, self.beta), main), memory


@dataclasses.dataclass(frozen=True)
class Shuffled(Transform):
    """The decoder's attention, shuffled in the rows after the images."""

    seed: Strength

    by_rows: ClassVar[bool] = True

    def weights(self, site, weights):
        place = jnp.cumsum(site.image_id >= 0, axis=1) - 1
        source = shuffled(place[:, None], site.layer, self.seed, site.mask)
        shuffled_weights = jnp.take_along_axis(weights, source[:, None], axis=-1)
        return jnp.where(site.post_image[:, None, :, None], shuffled_weights, weights)


def shuffled(
    place: Int[Array, "*#B S"], layer: int, seed: Strength, taking_part: Bool[Array, "*B S"]
) -> Int[Array, "*B S"]:
    """For each participating column, the column whose weight it gets; other columns keep their own."""
    key = jnp.broadcast_to(hashed(place, layer, seed), taking_part.shape)
    last = jnp.uint32(0xFFFFFFFF)
    by_hash = jnp.argsort(jnp.where(taking_part, key, last), axis=-1, stable=True)
    by_place = jnp.argsort(~taking_part, axis=-1, stable=True)
    source = jnp.take_along_axis(by_hash, jnp.argsort(by_place, axis=-1), axis=-1)
    return jnp.where(taking_part, source, jnp.arange(taking_part.shape[-1]))


def hashed(place: Int[Array, "*S"], layer: int, seed: Strength) -> Array:
    """A 32-bit number for each place, unique within a layer."""
    mixed = jnp.asarray(seed).astype(jnp.uint32) * jnp.uint32(0xC2B2AE35)
    x = place.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + jnp.uint32((layer + 1) * 0x85EBCA6B & 0xFFFFFFFF) + mixed
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
