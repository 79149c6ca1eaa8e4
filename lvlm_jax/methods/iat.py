"""IAT: more attention to generated text in the middle layers (CVPR 2026, in the paper of AdaIAT).

In the last row of layers 5 to 17, on the columns of generated tokens, the newest among them:

    z <- z + α |z|      α 0.8

The last row of the prompt has no such column and stays plain.

Differs from the authors' code in: samples without an image, which are left alone here.

Rows: last. Stage: logits. Cost: explicit attention in one row.
"""

from typing import ClassVar

import jax.numpy as jnp

from lvlm_jax.methods.base import Method, Strength, strength, switch
from lvlm_jax.methods.depth import layer_range
from lvlm_jax.methods.registry import register


@register("iat")
class IAT(Method):
    """Increased attention to generated text; see the module for the formula."""

    alpha: Strength = strength(0.8, "share α of a logit's absolute value that is added to it", low=0, per="head")
    start_layer: int | float = switch(5, "first edited layer (a float: share of the depth)")
    end_layer: int | float | None = switch(18, "the layer after the last edited one")
    layers: tuple[int, ...] | None = switch(None, "explicit layers instead")

    PRESETS: ClassVar = {"llava-1.5": dict(alpha=0.8)}
    rows: ClassVar[str] = "last"

    def active(self, layer, num_layers, phase):
        return phase == "decode" and layer in layer_range(self.start_layer, self.end_layer, self.layers, num_layers)

    def logits(self, site, logits):
        edited = site.generated & site.image.any(axis=-1, keepdims=True)
        return jnp.where(edited[:, None, None, :], logits + self.alpha * jnp.abs(logits), logits)
