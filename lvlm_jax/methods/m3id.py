"""M3ID: contrast against the prompt without its images, stronger with every token. arXiv 2403.14003.

    g = e^{-λ t}      l + (1 - g) / g (l - l_noimage)      where l >= max l + ln β

t is the number of tokens generated before (kept in memory), so the first token is not contrasted, only cut;
λ is `decay`. The factor (1 - g) / g = e^{λ t} - 1 stops growing at e^80, where float32 would overflow.

Rows, layers, stages: none; the attention of both branches is plain. A sample without an image is left alone.
Cost: a second, shorter prompt, and one more row through the weights per token.
"""

from typing import ClassVar

import jax.numpy as jnp

from lvlm_jax.methods.base import Method, Readout, Strength, contrasted, strength
from lvlm_jax.methods.contrast import ImagePresence, where_image
from lvlm_jax.methods.registry import register

LARGEST_EXPONENT = 80.0


@register("m3id")
class M3ID(Method):
    """Multi-modal mutual-information decoding; see the module for the formulas."""

    decay: Strength = strength(0.02, "forgetting rate λ of the image, per token", low=0)
    beta: Strength = strength(0.1, "plausibility cut β", low=0, high=1)

    PRESETS: ClassVar = {"default": dict(decay=0.02, beta=0.1)}

    def branches(self):
        return (ImagePresence(), None)

    def contrast_prompt(self) -> str:
        return "no_image"

    def start(self, batch: int):
        return jnp.zeros((batch,))

    def combine(self, readout: Readout, memory):
        alpha = jnp.expm1(jnp.minimum(self.decay * memory, LARGEST_EXPONENT))[:, None]
        combined = contrasted(readout.main, readout.contrast, alpha, self.beta)
        return where_image(readout.carry, combined, readout.main), memory + 1
