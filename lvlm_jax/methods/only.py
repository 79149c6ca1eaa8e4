"""ONLY: one side path of the last row, added to the logits or subtracted from them. arXiv 2507.00898.

Layer 0, last row, per head: among the columns of text (all but the sample's first token) and among those of images,
weights above their group's mean + standard deviation (unbiased) become 0. H is the entropy of the remaining,
renormalised weights of a group; heads whose H_text / H_image is below the heads' mean become 0. o is the attention
output under these weights, after the output projection. At the last layer, with h its input, and with its own norms and
feed-forward block:

    g = 0.2 h + norm(o)      g <- g + FFN(norm'(g))      l~ = logits(g) + 0.5 l

With p, p~ the distributions of l and l~, and d = Σ |p - p~|:   l + 3 l~ if d < τ, else 2 l - l~;   l >= max l + ln β

β is 0.1; τ is 0.2 for yes/no questions, 0.25 for descriptions. Entropies take ln(x + 1e-6), as the authors do.

Differs from the authors' code in: nothing known.

Rows: last. Stages: observe (layer 0), enter (last layer). A sample without an image is left alone.
Cost: explicit attention of one row and its values in layer 0, one more row through one feed-forward block and the head.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lvlm_jax.attention import Context
from lvlm_jax.methods.base import Method, Readout, Strength, strength, switch
from lvlm_jax.methods.contrast import has_image, where_image
from lvlm_jax.methods.cuts import plausible
from lvlm_jax.methods.registry import register

FAINT = 1e-6


@register("only")
class ONLY(Method):
    """One-layer intervention; see the module for the formulas."""

    alpha_complement: Strength = strength(3.0, "weight of the side path's logits if the two distributions agree", low=0)
    alpha_contrast: Strength = strength(1.0, "strength of the contrast if they do not agree", low=0)
    tau: Strength = strength(
        0.2, "distance τ of the two distributions from which they do not agree", low=0, high=2, flat="a threshold"
    )
    beta: Strength = strength(0.1, "plausibility cut β", low=0, high=1, cuts=True)
    share: Strength = strength(0.2, "share of the last layer's input in the side path", low=0)
    final_share: Strength = strength(0.5, "share of the main logits in the side path's logits", low=0)
    source_layer: int = switch(0, "the layer whose attention is edited")

    PRESETS: ClassVar = {"pope": dict(tau=0.2), "chair": dict(tau=0.25)}
    rows: ClassVar[str] = "last"

    def active(self, layer, num_layers, phase):
        return layer == self.source_layer

    def begin(self, context: Context, embeddings):
        return has_image(context), jnp.zeros((embeddings.shape[0], 1, embeddings.shape[2]), embeddings.dtype)

    def observe(self, site, weights):
        visible = site.mask[:, -1]
        first = jnp.arange(visible.shape[1]) == (site.image_id >= 0).argmax(axis=1)[:, None]
        row = weights[:, :, -1]
        text, of_text = drop_high_weights(row, visible & ~site.image & ~first)
        image, of_image = drop_high_weights(row, visible & site.image)
        ratio = of_text / jnp.where(of_image > 0, of_image, 1)
        ratio = jnp.where(of_image > 0, ratio, jnp.where(of_text > 0, jnp.inf, 0))
        row = jnp.where(text & image, row, 0)
        row = jnp.where((ratio >= ratio.mean(axis=-1, keepdims=True))[..., None], row, 0)
        values = site.read_values().astype(jnp.float32)
        grouped = row.reshape(row.shape[0], values.shape[1], -1, row.shape[2])
        mixed = jnp.einsum("BKGS,BKSD->BKGD", grouped, values, precision=jax.lax.Precision.HIGHEST)
        return site.carry[0], site.project(mixed.reshape(*row.shape[:2], 1, -1))

    def enter(self, stream):
        if stream.layer != stream.num_layers - 1:
            return stream.carry
        present, output = stream.carry
        side = self.share * stream.layer_input[:, -1:] + stream.input_norm(output)
        side = side + stream.feed_forward(stream.mlp_norm(side))
        return present, side

    def further_exits(self, carry):
        return carry[1].swapaxes(0, 1)

    def combine(self, readout: Readout, memory):
        present, _ = readout.carry
        main = readout.main
        side = readout.exits[0] + self.final_share * main
        apart = jnp.abs(jax.nn.softmax(main) - jax.nn.softmax(side)).sum(axis=-1, keepdims=True)
        contrast = (1 + self.alpha_contrast) * main - self.alpha_contrast * side
        combined = jnp.where(apart < self.tau, main + self.alpha_complement * side, contrast)
        return where_image(present, plausible(combined, main, self.beta), main), memory


def drop_high_weights(
    row: Float[Array, "B H S"], group: Bool[Array, "B S"]
) -> tuple[Bool[Array, "B H S"], Float[Array, "B H"]]:
    """Returns which weights stay (all outside the group do), and the entropy of the remaining weights of the group."""
    inside = group[:, None]
    count = inside.sum(axis=-1, keepdims=True)
    mean = jnp.where(inside, row, 0).sum(axis=-1, keepdims=True) / jnp.maximum(count, 1)
    square = jnp.where(inside, (row - mean) ** 2, 0).sum(axis=-1, keepdims=True) / jnp.maximum(count - 1, 1)
    high = inside & (row > mean + jnp.sqrt(jnp.where(square > 0, square, 1)) * (square > 0))
    remaining = jnp.where(inside & ~high, row, 0)
    total = remaining.sum(axis=-1, keepdims=True)
    shares = remaining / jnp.where(total > 0, total, 1)
    return ~high, -(shares * jnp.log(shares + FAINT)).sum(axis=-1)
