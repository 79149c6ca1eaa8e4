"""EAH: in one shallow layer, all heads use the attention map of the head with most vision sinks. arXiv 2411.09968.

For head h with weights w, and image column j of image k:

    c_h[j] = sum of w_h[x, j] over later rows x > j of image k / number of those rows

j is a vision sink of h if c_h[j] > β. Let h* be the head with most sinks, over all images of the sample, the first
one on ties. If it has any, every head of the layer attends with the whole map of h* (text rows too), each with its
own values.

`variant="code"`: the sum is over all later rows, text included, and is divided by S₀ + E - j, where S₀ is the sample's
first image position and E the one after its last; β is 0.0008 and the layer index 15; nothing changes if h* is head 0.

Differs from the paper and from the authors' code in: nothing known.

Rows that do not see j (sliding window) do not count. Rows: all of the prompt. Layers: one. Stage: weights. Decode steps
are plain. Cost: the prompt's attention map of that layer once more; nothing per token.
"""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lvlm_jax.attention import Site
from lvlm_jax.methods.base import Method, Strength, strength, switch
from lvlm_jax.methods.depth import layer_range
from lvlm_jax.methods.registry import register

PUBLISHED = {"paper": (1, 0.002), "code": (15, 0.0008)}  # layer, β


@register("eah")
class EAH(Method):
    """Enhanced attention heads; see the module for the formulas."""

    beta: Strength | None = strength(
        None, "threshold β of a vision sink; default 0.002 (paper), 0.0008 (code)", low=0, flat="a threshold"
    )
    layer: int | float | None = switch(
        None, "the edited layer (a float: share of the depth); default 1 (paper) or 15 (code)"
    )
    variant: str = switch("paper", "formulas of the paper or of the authors' code", choices=("paper", "code"))

    rows: ClassVar[str] = "all"
    by_rows: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.beta is None:
            object.__setattr__(self, "beta", np.float32(PUBLISHED[self.variant][1]))

    def active(self, layer, num_layers, phase):
        default_layer = PUBLISHED[self.variant][0] if self.layer is None else self.layer
        return phase == "prefill" and layer == layer_range(default_layer, None, None, num_layers)[0]

    def statistics(self, site, weights):
        return received_attention(site, weights, own_image=self.variant == "paper")

    def weights(self, site, weights):
        total, rows = self.over_all_rows(site, weights)
        count = jnp.maximum(rows, 1) if self.variant == "paper" else code_divisor(site)
        sinks = (site.image[:, None, :] & (total / count[:, None] > self.beta)).sum(axis=-1)
        best = sinks.argmax(axis=1)
        has_sinks = sinks.max(axis=1) > 0
        if self.variant == "code":
            has_sinks &= best > 0
        chosen = jnp.take_along_axis(weights, best[:, None, None, None], axis=1)
        return jnp.where(has_sinks[:, None, None, None], chosen, weights)


def received_attention(
    site: Site, weights: Float[Array, "B H R S"], own_image: bool
) -> tuple[Float[Array, "B H S"], Int[Array, "B S"]]:
    """The sum of the weights that later rows put on each column, and the number of these rows.

    Args:
        own_image: whether only rows of the column's own image count. Rows that do not see the column never count.
    """
    columns = jnp.arange(site.image_id.shape[1])
    givers = site.mask & (site.row_index[:, None] > columns[None, :])[None]
    if own_image:
        givers &= site.image_id[:, site.row_index][:, :, None] == site.image_id[:, None, :]
    return jnp.where(givers[:, None], weights, 0).sum(axis=2), givers.sum(axis=1)


def code_divisor(site: Site) -> Int[Array, "B S"]:
    """S₀ + E - j, the divisor of the authors' code."""
    position = jnp.cumsum(site.image_id >= 0, axis=1) - 1  # padding on the left does not count
    first = jnp.where(site.image, position, position.shape[1]).min(axis=1, keepdims=True)
    end = jnp.where(site.image, position, -1).max(axis=1, keepdims=True) + 1
    return jnp.maximum(first + end - position, 1)
