"""DAMRO: contrast with a prompt of only the image tokens that the tower's class token attends to. arXiv 2410.04514.

For each image, the contrast branch keeps the `tokens` image tokens to which the vision tower's class token attends
most; the other image tokens are removed, and positions are renumbered. The kept tokens are high-norm outliers of the
background. Attention is computed in the layer whose output the connector reads, as one head over all channels:

    softmax(q_class kᵀ / √channels)      (InternVL: the mean over the patches that become one token)

Then (1 + α) l - α l~ where l >= max l + ln β. α is 2, β 0.1, `tokens` 10.

Differs from the authors' code in: the kept tokens, which stay in the order of the image here and are ordered by
attention there; several images, each of which keeps its own tokens here.

Rows, layers, stages: none; the attention of both branches is plain. A sample without an image is left alone. Families
whose towers have no class token, or whose connectors mix tiles of an image, are refused. Cost: the tower twice more, a
second, short prompt, and one more row through the weights per token.
"""

from typing import ClassVar

import jax.numpy as jnp

from lvlm_jax.methods import per_image
from lvlm_jax.methods.base import Method, Readout, Strength, strength, switch
from lvlm_jax.methods.contrast import ImagePresence, contrast_logits, where_image
from lvlm_jax.methods.registry import register


@register("damro")
class DAMRO(Method):
    """Dive into attention mechanism of LVLM; see the module for the formulas."""

    alpha: Strength = strength(2.0, "contrast strength α", low=0)
    beta: Strength = strength(0.1, "plausibility cut β", low=0, high=1, cuts=True)
    tokens: int = switch(10, "image tokens that the contrast branch keeps of each image")

    PRESETS: ClassVar = {"default": dict(alpha=2.0, beta=0.1, tokens=10)}

    def branches(self):
        return (ImagePresence(), None)

    def contrast_prompt(self) -> str:
        return "fewer_tokens"

    def keep_tokens(self, image_id, image_count, salience):
        inside = per_image.members(image_id, image_count)
        keep = jnp.minimum(inside.sum(axis=-1), self.tokens)
        return (image_id == 0) | per_image.largest(image_id, inside, salience, keep)

    def combine(self, readout: Readout, memory):
        combined = contrast_logits(readout.main, readout.contrast, self.alpha, self.beta)
        return where_image(readout.carry, combined, readout.main), memory
