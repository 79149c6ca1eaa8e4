"""PAI: more attention to the image, contrasted with the prompt without it. arXiv 2407.21771.

Attention, main branch, last row (the last prompt token, then every new one), layers from `start_layer` = 2 on, in
all heads: z <- z + α |z| on image columns, before the softmax.

Logits: with the log-probabilities s of that branch and u of a plain branch whose prompt has no image,

    γ (s - u) + u      where s >= max s + ln β

Differs from the paper and from the authors' code in: nothing known.

Stages: logits. A sample without an image is left alone.
Cost: explicit attention in one row, a second, shorter prompt, and one more row through the weights per token.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from lvlm_jax.attention import Context
from lvlm_jax.methods.base import Method, Readout, Strength, strength, switch
from lvlm_jax.methods.contrast import has_image, where_image
from lvlm_jax.methods.cuts import plausible
from lvlm_jax.methods.depth import layer_range
from lvlm_jax.methods.registry import register


@register("pai")
class PAI(Method):
    """Pay attention to the image; see the module for the formulas."""

    alpha: Strength = strength(0.2, "share α of an image logit's absolute value that is added to it", low=0, per="head")
    gamma: Strength = strength(1.1, "guidance γ; 1 for no contrast", low=0)
    beta: Strength = strength(0.1, "plausibility cut β", low=0, high=1, cuts=True)
    start_layer: int | float = switch(2, "first layer with the edit")
    end_layer: int | float | None = switch(None, "the layer after the last one with the edit")
    layers: tuple[int, ...] | None = switch(None, "explicit layers, used instead")

    PRESETS: ClassVar = {"default": dict(alpha=0.2, gamma=1.1, beta=0.1)}
    rows: ClassVar[str] = "last"

    def active(self, layer: int, num_layers: int, phase: str) -> bool:
        return layer in layer_range(self.start_layer, self.end_layer, self.layers, num_layers)

    def begin(self, context: Context, embeddings):
        return has_image(context)

    def logits(self, site, logits):
        return jnp.where(site.image[:, None, None, :], logits + self.alpha * jnp.abs(logits), logits)

    def branches(self):
        return (self, None)

    def contrast_prompt(self) -> str:
        return "no_image"

    def combine(self, readout: Readout, memory):
        edited = jax.nn.log_softmax(readout.main, axis=-1)
        blind = jax.nn.log_softmax(readout.contrast, axis=-1)
        guided = plausible(self.gamma * (edited - blind) + blind, edited, self.beta)
        return where_image(readout.carry, guided, readout.main), memory
