"""DAB: balances attention between several images. arXiv 2508.00726.

In rows after the images, with r_k a head's mass on the k-th image of N_k tokens and r̄ the mean of r_k over the
sample's images:

    if Σ r_k > τ:   w_j <- w_j - α (r_k - r̄) / N_k    on the columns j of image k

in all layers, for prompt rows; with `decode` also for answer rows. τ is 0.2, α 0.5. A single image is left alone.

Differs from the authors' code in: nothing known.

Rows: after the last image. Stage: weights. Cost: explicit attention in those rows.
"""

from typing import ClassVar

import jax.numpy as jnp

from lvlm_jax.methods import per_image
from lvlm_jax.methods.base import Method, Strength, strength, switch
from lvlm_jax.methods.depth import layer_range
from lvlm_jax.methods.registry import register


@register("dab")
class DAB(Method):
    """Dynamic attention balancing between images; see the module for the formula."""

    alpha: Strength = strength(
        0.5, "how far a head's mass on each image moves to the images' mean, α", low=0, per="head"
    )
    tau: Strength = strength(0.2, "mass τ on all images from which a head is edited", low=0, high=1, flat="a threshold")
    decode: bool = switch(False, "edit the rows of the answer too", choices=(True, False))
    start_layer: int | float = switch(0, "first edited layer (a float: share of the depth)")
    end_layer: int | float | None = switch(None, "the layer after the last edited one")
    layers: tuple[int, ...] | None = switch(None, "explicit layers instead")

    rows: ClassVar[str] = "post_image"
    by_rows: ClassVar[bool] = True

    def active(self, layer, num_layers, phase):
        edited = layer in layer_range(self.start_layer, self.end_layer, self.layers, num_layers)
        return edited and (self.decode or phase == "prefill")

    def weights(self, site, weights):
        inside = per_image.members(site.image_id, site.image_count).astype(jnp.float32)
        count = inside.sum(axis=-1)
        mass = jnp.einsum("BHRS,BIS->BHRI", weights, inside)
        images = jnp.maximum((count > 0).sum(axis=-1), 1)[:, None, None, None]
        total = mass.sum(axis=-1, keepdims=True)
        excess = (mass - total / images) / jnp.maximum(count, 1)[:, None, None]
        edited = weights - self.alpha * jnp.einsum("BHRI,BIS->BHRS", excess, inside)
        return jnp.where((total > self.tau) & site.post_image[:, None, :, None], edited, weights)
