"""NoLan: contrast with the prompt without images, stronger where the two agree. arXiv 2602.22144.

With l and l~ the next-token logits of the prompt with and without its images, p and u their distributions:

    g = KL(p | u) + KL(u | p)      a = κ (tanh(1 / g) + 1), κ 0.8
    (1 + a) l - a l~

without a plausibility cut. If the image changes nothing, a is 2 κ; if it decides everything, a is κ.

Differs from the paper in: nothing known. We read its symmetric divergence as the sum of both directions, in nats.

Rows, layers, stages: none; the attention of both branches is plain. A sample without an image is left alone.
Cost: a second, shorter prompt, and one more row through the weights per token.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from lvlm_jax.methods.base import Method, Readout, Strength, strength
from lvlm_jax.methods.contrast import ImagePresence, where_image
from lvlm_jax.methods.registry import register


@register("nolan")
class NoLan(Method):
    """No language prior; see the module for the formulas."""

    kappa: Strength = strength(0.8, "strength κ; the contrast has a strength between κ and 2 κ", low=0)

    PRESETS: ClassVar = {"default": dict(kappa=0.8)}

    def branches(self):
        return (ImagePresence(), None)

    def contrast_prompt(self) -> str:
        return "no_image"

    def combine(self, readout: Readout, memory):
        seeing, blind = jax.nn.log_softmax(readout.main), jax.nn.log_softmax(readout.contrast)
        apart = ((jnp.exp(seeing) - jnp.exp(blind)) * (seeing - blind)).sum(axis=-1, keepdims=True)
        # For smaller g, tanh(1 / g) is 1 and its slope 0.
        weight = self.kappa * (jnp.tanh(1 / jnp.maximum(apart, 1e-3)) + 1)
        combined = (1 + weight) * readout.main - weight * readout.contrast
        return where_image(readout.carry, combined, readout.main), memory
