"""SPIN: scales down the heads that attend least to the image. arXiv 2505.16411.

In the last row of every layer, the ⌈ρ H⌉ of H heads with most attention to the images keep their outputs; the outputs
of the other heads are multiplied by s. ρ is 0.95, s 0.08. On ties the earlier head is kept.

    variant="paper"   attention to the images: the sum of a head's weights on image columns
    variant="code"    the sum of its logits there, before the softmax, and ⌊ρ H⌋ heads

Differs from the authors' code in: nothing known, under "code".

Rows: last. Stage: weights (a head's output is linear in them). A sample without an image is left alone.
Cost: explicit attention in one row.
"""

from typing import ClassVar

import jax.numpy as jnp

from lvlm_jax.methods.base import Method, Strength, strength, switch
from lvlm_jax.methods.depth import layer_range
from lvlm_jax.methods.registry import register


@register("spin")
class SPIN(Method):
    """Image-guided head suppression; see the module for the formulas."""

    rho: Strength = strength(0.95, "share ρ of the heads that are kept", low=0, high=1, flat="a number of heads")
    scale: Strength = strength(0.08, "factor s on the outputs of the other heads", low=0, per="head")
    start_layer: int | float = switch(0, "first edited layer (a float: share of the depth)")
    end_layer: int | float | None = switch(None, "the layer after the last edited one")
    layers: tuple[int, ...] | None = switch(None, "explicit layers instead")
    variant: str = switch("paper", "formulas of the paper or of the authors' code", choices=("paper", "code"))

    PRESETS: ClassVar = {"llava-1.5": dict(rho=0.95, scale=0.08)}
    rows: ClassVar[str] = "last"

    def active(self, layer, num_layers, phase):
        return layer in layer_range(self.start_layer, self.end_layer, self.layers, num_layers)

    def weights(self, site, weights):
        visible = (site.image & site.mask[:, -1])[:, None]
        scores = site.logits if self.variant == "code" else weights
        attention = jnp.where(visible, scores[:, :, -1], 0).sum(axis=-1)
        rank = jnp.argsort(jnp.argsort(-attention, axis=-1, stable=True), axis=-1)
        count = self.rho * attention.shape[1]
        # A float32 ρ may differ slightly from the intended decimal number: 0.9 of 10 heads are 9.
        keep = jnp.floor(count + 1e-4) if self.variant == "code" else jnp.ceil(count - 1e-4)
        turned_down = (rank >= keep) & site.image.any(axis=-1, keepdims=True)
        return weights * jnp.where(turned_down[..., None, None], self.scale, 1.0)
