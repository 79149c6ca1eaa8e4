"""VAF (ClearSight): amplifies visual attention in the layers that fuse image and text. arXiv 2503.13107.

In rows after the last image, the logits z of layers 9 to 14 become

    z_j <- 1.15 z_j   on image columns,      z_j <- 0.95 z_j   on system columns (text before the first image).

Negative logits grow in size like positive ones, as in the authors' code. A sample without an image has neither such
rows nor such columns.

Differs from the authors' code in: nothing known.

Rows: after the last image, prompt and decoded. Stage: logits. Cost: none worth measuring.
"""

from typing import ClassVar

import jax.numpy as jnp

from lvlm_jax.methods.base import Method, Strength, strength, switch
from lvlm_jax.methods.depth import layer_range
from lvlm_jax.methods.registry import register


@register("vaf")
class VAF(Method):
    """Visual amplification fusion; see the module for the formula."""

    enhance: Strength = strength(1.15, "factor on logits of image columns", low=0, per="head")
    suppress: Strength = strength(0.95, "factor on logits of system columns", low=0, per="head")
    start_layer: int | float = switch(9, "first edited layer (a float: share of the depth)")
    end_layer: int | float | None = switch(15, "the layer after the last edited one")
    layers: tuple[int, ...] | None = switch(None, "explicit layers instead")

    rows: ClassVar[str] = "post_image"
    by_rows: ClassVar[bool] = True

    def active(self, layer, num_layers, phase):
        return layer in layer_range(self.start_layer, self.end_layer, self.layers, num_layers)

    def logits(self, site, logits):
        image, system = (columns[:, None, None] for columns in (site.image, site.system))
        edited = logits * jnp.where(image, self.enhance, jnp.where(system, self.suppress, 1.0))
        return jnp.where(site.post_image[:, None, :, None], edited, logits)
