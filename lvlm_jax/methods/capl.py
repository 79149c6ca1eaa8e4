"""CAPL's attention: images of one prompt attend to each other, or must not. arXiv 2603.07048.

Selective cross-image attention (`mode="cross"`). In each image, the ⌊ρ N⌋ tokens (at least one) whose embedding has the
largest L2 norm at the decoder's input are selected; on ties the earlier one. "Cross pairs" are all pairs of selected
tokens of different images, in either order.

    out = (1 - σ) softmax(z over visible columns) V + σ softmax(z over visible columns and cross pairs) V

in layers of even index, so selected tokens of earlier images see those of later ones. Both softmaxes share the values,
so the code mixes their weights. Nothing changes within an image, for text, or with one image. With `tile`, each tile of
`tile` tokens selects its own share (InternVL2.5).

Truncated attention (`mode="truncated"`) produces rejected answers for preference learning: in every layer, a token of
an image does not see other images. `variant="code-qwen"`: an image token sees only itself and earlier text. The variant
has no effect on `mode="cross"`.

Differs from the paper and from the authors' code in: nothing known.

Rows: all of the prompt; decode steps are plain. Stages: weights (cross), mask (truncated). Cost: for cross, one more
softmax of the prompt's attention map in half of the layers and one sort; nothing per token.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lvlm_jax.attention import Site
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods import per_image
from lvlm_jax.methods.base import Method, Strength, strength, switch
from lvlm_jax.methods.depth import layer_range
from lvlm_jax.methods.registry import register


@register("capl")
class CAPL(Method):
    """Selective cross-image attention, or truncated attention; see the module for the formulas."""

    sigma: Strength = strength(0.5, "weight σ of the cross-image softmax", low=0, high=1, per="head")
    rho: Strength = strength(
        0.95, "share ρ of each image's tokens that is selected", low=0, high=1, flat="a number of tokens"
    )
    mode: str = switch("cross", "images attend to each other, or must not", choices=("cross", "truncated"))
    variant: str = switch(
        "paper", "for truncated: an image token sees its image, or only itself", choices=("paper", "code-qwen")
    )
    start_layer: int | float = switch(0, "first edited layer (a float: share of the depth)")
    end_layer: int | float | None = switch(None, "the layer after the last edited one")
    layers: tuple[int, ...] | None = switch(
        None, "explicit layers instead, odd ones too; by default mode 'cross' edits only even layers"
    )
    tile: int | None = switch(None, "tokens per tile, if each tile selects its own share; default whole images")

    rows: ClassVar[str] = "all"
    by_rows: ClassVar[bool] = True
    image_rows: ClassVar[bool] = True
    PRESETS: ClassVar = {
        "qwen2.5-vl": dict(rho=0.95),
        "internvl2.5": dict(rho=0.95, tile=256),
        "glm-4.1v": dict(rho=0.9),
    }

    def __post_init__(self):
        super().__post_init__()
        if self.tile is not None and (not isinstance(self.tile, int) or self.tile < 1):
            raise LVLMError(f"CAPL: tile is {self.tile!r}; expected a whole number >= 1, or None")

    def active(self, layer, num_layers, phase):
        layers = layer_range(self.start_layer, self.end_layer, self.layers, num_layers)
        skipped = self.mode == "cross" and self.layers is None and layer % 2 == 1
        return phase == "prefill" and layer in layers and not skipped

    def begin(self, context, embeddings):
        if self.mode == "truncated" or context.phase == "decode":
            return ()
        # The squared norm orders tokens like the norm.
        norms = jnp.square(embeddings.astype(jnp.float32)).sum(axis=-1)
        image_id, image_count = context.image_id, context.image_count
        if self.tile is not None:  # tiles select like separate images
            image_count += image_id.shape[1] // self.tile
            image_id = tiles(image_id, context.image_count, self.tile)
        inside = per_image.members(image_id, image_count)
        return per_image.largest(image_id, inside, norms, per_image.share(self.rho, inside))

    def mask(self, site, mask):
        if self.mode == "cross":
            return mask
        row_image = site.image_id[:, site.row_index][:, :, None]
        same = row_image == site.image_id[:, None, :]
        if self.variant == "code-qwen":
            same = (site.row_index[:, None] == jnp.arange(site.image_id.shape[1])[None, :])[None]
        hidden = (row_image > 0) & site.image[:, None, :] & ~same
        return mask & ~hidden[:, None]

    def weights(self, site, weights):
        if self.mode == "truncated":
            return weights
        visible = site.mask | cross_pairs(site, site.carry)
        logits = jnp.where(visible[:, None], site.logits, jnp.finfo(jnp.float32).min)
        return (1 - self.sigma) * weights + self.sigma * jax.nn.softmax(logits, axis=-1)

    def mixture(self, layer, num_layers, context, carry, mask):
        images = jnp.maximum(context.image_id, 0)
        if self.mode == "cross":
            return (1 - self.sigma, mask), (self.sigma, mask.crossing(jnp.where(carry, images, 0)))
        if self.variant == "code-qwen":
            return None
        return ((1.0, mask.of_pictures(images, jnp.take(images, mask.row, axis=1))),)


def tiles(image_id: Int[Array, "B S"], image_count: int, tokens: int) -> Int[Array, "B S"]:
    """Like `image_id`, but numbers the tiles of `tokens` tokens in each sample instead of its images."""
    inside = per_image.members(image_id, image_count)
    of_image = -(-inside.sum(axis=-1) // tokens)
    before = jnp.cumsum(of_image, axis=-1) - of_image
    number = before[:, :, None] + (jnp.cumsum(inside, axis=-1) - 1) // tokens + 1
    return jnp.where(image_id > 0, jnp.where(inside, number, 0).sum(axis=1), image_id)


def cross_pairs(site: Site, selected: Bool[Array, "B S"]) -> Bool[Array, "B R S"]:
    """Pairs of a row and a column that are selected tokens of different images."""
    pairs = selected[:, site.row_index][:, :, None] & selected[:, None, :]
    return pairs & (site.image_id[:, site.row_index][:, :, None] != site.image_id[:, None, :])
