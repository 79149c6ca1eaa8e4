"""Nullu: removes hallucination directions from the output of feed-forward blocks. arXiv 2412.13817.

In layers 16 to 31 of 32 (as a share of the depth), with v_1 … v_4 the first right singular vectors of the differences
D_l = ½ (h_l(true) - h_l(hallucinated)) over pairs of answers:

    W_down <- (I - Σ_{r <= 4} v_r v_rᵀ) W_down

This method applies the same edit to the output x of the block: x <- x - α Σ v_r (v_rᵀ x), with α 1. `lvlm fit nullu`
finds the directions; with `--export FOLDER` it writes the edited checkpoint, which any software can load and which
costs nothing. We read h_l as the mean of layer l's output over the answer's tokens.

Differs from the paper in: nothing known.

Rows: all. Stage: mlp. Samples without an image are edited too, as they would be by the edited checkpoint.
Cost: four products of a row with a vector in half the layers; none once exported.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from lvlm_jax.methods.base import Method, Strength, fitted, strength, switch
from lvlm_jax.methods.depth import layer_range
from lvlm_jax.methods.fitted import Fitted
from lvlm_jax.methods.registry import register
from lvlm_jax.methods.vti import needed


@register("nullu")
class Nullu(Method):
    """Null space projection of hallucination directions; see the module for the formula."""

    alpha: Strength = strength(1.0, "share α of the directions that is removed", low=0, high=1, per="layer")
    rank: int = switch(4, "how many directions")
    start_layer: int | float = switch(0.5, "first edited layer (a float: share of the depth)")
    end_layer: int | float | None = switch(None, "the layer after the last edited one")
    layers: tuple[int, ...] | None = switch(None, "explicit layers instead")
    fitted: Fitted | None = fitted("directions, a file of lvlm fit nullu")

    rows: ClassVar[str] = "last"

    def edited(self, num_layers: int) -> tuple[int, ...]:
        """The layers whose feed-forward blocks are edited; static."""
        return layer_range(self.start_layer, self.end_layer, self.layers, num_layers)

    def active(self, layer, num_layers, phase):
        return layer in self.edited(num_layers)  # no attention stages, but only these layers are edited

    def directions(self, layer: int) -> jax.Array:
        """The directions of a layer, `Float[Array, "R E"]`."""
        return needed(self)["directions"][layer, : self.rank]

    def mlp(self, stream, output):
        if stream.layer not in self.edited(stream.num_layers):
            return output
        x, directions = output.astype(jnp.float32), self.directions(stream.layer)
        exact = jax.lax.Precision.HIGHEST
        along = jnp.einsum("BTE,RE->BTR", x, directions, precision=exact)
        return x - self.alpha * jnp.einsum("BTR,RE->BTE", along, directions, precision=exact)
