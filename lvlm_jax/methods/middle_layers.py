"""Middle layers: raises attention to the image in the layers that take in visual information. arXiv 2411.16724.

For the last query row in layers 5 to 18, on every image column j and in every head h,

    z_hj <- z_hj + α mean over heads of |z_j|,    α = 0.5

so that heads agree on the columns that are raised most. A sample without an image has no such column.

Differs from the paper and from the authors' code in: nothing known.

Rows: the last of the prompt and every decoded one. Stage: logits. Cost: none worth measuring.
"""

from typing import ClassVar

import jax.numpy as jnp

from lvlm_jax.methods.base import Method, Strength, strength, switch
from lvlm_jax.methods.depth import layer_range
from lvlm_jax.methods.registry import register


@register("middle_layers")
class MiddleLayers(Method):
    """Image logits raised by the heads' mean in the middle layers; see the module for the formula."""

    alpha: Strength = strength(0.5, "share of the mean absolute logit that is added, α", low=0, per="head")
    start_layer: int | float = switch(5, "first edited layer (a float: share of the depth)")
    end_layer: int | float | None = switch(19, "the layer after the last edited one")
    layers: tuple[int, ...] | None = switch(None, "explicit layers instead")

    rows: ClassVar[str] = "last"

    def active(self, layer, num_layers, phase):
        return layer in layer_range(self.start_layer, self.end_layer, self.layers, num_layers)

    def logits(self, site, logits):
        raised = logits + self.alpha * jnp.abs(logits).mean(axis=1, keepdims=True)
        return jnp.where(site.image[:, None, None, :], raised, logits)
