"""AvisC: contrast with the prompt without its inattentive image tokens. arXiv 2405.17820.

A warm-up pass gives a_l[j], the head-mean weight of the last prompt row on image column j in layer l. Layers are sorted
by their share of the image's mass Σ_j a_l[j], and the first 1 + #{cumulative shares below γ} are used. With a their
mean,

    J = {j: a[j] < mean a + λ std a}      (over all image columns of the sample; unbiased)

and the contrast branch reads zeros instead of the image tokens in J. This leaves the tokens that draw attention
whatever the question is. Then (1 + α) l - α l~ where l >= max l + ln β. γ is 0.5, λ 1, α 1, β 0.1.

Differs from the authors' code in: statistics, which are per sample here and pool the samples of a batch there.

Rows, layers, stages: none; the attention of both branches is plain. A sample without an image is left alone.
Cost: the prompt twice more, and one more row through the weights per token.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lvlm_jax.methods.base import Method, Readout, Strength, data, strength
from lvlm_jax.methods.contrast import ImagePresence, contrast_logits, where_image
from lvlm_jax.methods.registry import register


@register("avisc")
class AvisC(Method):
    """Attentional vision calibration; see the module for the formulas."""

    alpha: Strength = strength(1.0, "contrast strength α", low=0)
    beta: Strength = strength(0.1, "plausibility cut β", low=0, high=1, cuts=True)
    gamma: Strength = strength(
        0.5, "share γ of the image's mass in the chosen layers", low=0, high=1, flat="a number of layers"
    )
    lambda_: Strength = strength(1.0, "a token stays if it is at least λ deviations above the mean", flat="a threshold")
    attention: jax.Array | None = data("attention of the last prompt row in every layer; `after_warm_up` sets it")

    PRESETS: ClassVar = {"default": dict(alpha=1.0, beta=0.1, gamma=0.5, lambda_=1.0)}
    warm_up_fields: ClassVar[tuple[str, ...]] = ("attention",)

    def branches(self):
        return (ImagePresence(), None)

    def contrast_prompt(self) -> str:
        return "tokens"

    def after_warm_up(self, warm_up) -> "AvisC":
        return dataclasses.replace(self, attention=warm_up.attention)

    def contrast_tokens(self, embeddings, image_id):
        image = image_id > 0
        masked = image & ~attentive(self.attention, image, self.gamma, self.lambda_)
        return jnp.where(masked[..., None], 0, embeddings)

    def combine(self, readout: Readout, memory):
        combined = contrast_logits(readout.main, readout.contrast, self.alpha, self.beta)
        return where_image(readout.carry, combined, readout.main), memory


def attentive(
    attention: Float[Array, "L B T"], image: Bool[Array, "B T"], gamma: Strength, lambda_: Strength
) -> Bool[Array, "B T"]:
    """Image columns that draw at least mean + λ std in the layers that hold a share γ of the image's mass."""
    on_image = jnp.where(image, attention, 0)
    mass = on_image.sum(axis=-1)
    shares = mass / jnp.where(mass.sum(axis=0) > 0, mass.sum(axis=0), 1)
    order = jnp.argsort(-shares, axis=0, stable=True)
    reached = jnp.cumsum(jnp.take_along_axis(shares, order, axis=0), axis=0)
    num_layers = 1 + (reached < gamma).sum(axis=0)
    chosen = jnp.argsort(order, axis=0) < num_layers
    mean_weight = jnp.where(chosen[..., None], on_image, 0).sum(axis=0) / chosen.sum(axis=0)[:, None]
    count = image.sum(axis=-1, keepdims=True)
    mean = mean_weight.sum(axis=-1, keepdims=True) / jnp.maximum(count, 1)
    square = jnp.where(image, (mean_weight - mean) ** 2, 0).sum(axis=-1, keepdims=True)
    return mean_weight >= mean + lambda_ * jnp.sqrt(square / jnp.maximum(count - 1, 1))
