"""FarSight, a port: later columns take a share of the softmax before they are hidden.

The paper is arXiv 2505.16652. In row i of the prompt, each later column j > i of the sample is a register with the
logit -σ (j - i). The softmax runs over the columns that the row sees and over its registers, whose weights are then set
to 0. So the weights of a row sum to less than 1; the further a row is from the end, the smaller is its sum:

    w <- w Z / (Z + Σ_{j > i} e^{-σ (j - i)})      Z = Σ e^z over the columns that are seen

σ is ln 256 / ln 1024 = 0.8. The last row and the rows of the answer have no registers.

Differs from the paper in: unknown; it was written from the port and not compared with the paper's text. A sample
without an image is left alone here.

Rows: all, prompt only. Layers: all. Stage: weights. Cost: explicit attention in the whole prompt.
"""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from lvlm_jax.methods.base import Method, Strength, strength, switch
from lvlm_jax.methods.depth import layer_range
from lvlm_jax.methods.registry import register


@register("farsight")
class FarSight(Method):
    """Attention registers after the diagonal, a port; see the module for the formula."""

    sigma: Strength = strength(
        math.log(256) / math.log(1024), "decrease σ of a register's logit with distance", low=0, per="layer"
    )
    start_layer: int | float = switch(0, "first edited layer (a float: share of the depth)")
    end_layer: int | float | None = switch(None, "the layer after the last edited one")
    layers: tuple[int, ...] | None = switch(None, "explicit layers instead")

    rows: ClassVar[str] = "all"
    by_rows: ClassVar[bool] = True

    def active(self, layer, num_layers, phase):
        return phase == "prefill" and layer in layer_range(self.start_layer, self.end_layer, self.layers, num_layers)

    def weights(self, site, weights):
        columns = jnp.arange(site.image_id.shape[1])
        distance = (columns[None, :] - site.row_index[:, None]).astype(jnp.float32)
        later = (distance > 0)[None] & (site.image_id >= 0)[:, None]
        registers = jnp.where(later, jnp.exp(-self.sigma * jnp.maximum(distance, 0)), 0).sum(axis=-1)
        logits = jnp.where(site.mask[:, None], site.logits, jnp.finfo(jnp.float32).min)
        share = 1 / (1 + registers[:, None] * jnp.exp(-jax.nn.logsumexp(logits, axis=-1)))
        alone = ~site.image.any(axis=-1)[:, None, None] | ~site.mask.any(axis=-1)[:, None]
        return weights * jnp.where(alone, 1.0, share)[..., None]
