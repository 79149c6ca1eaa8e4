"""SID: contrast with a branch that sees only the least attended image tokens. arXiv 2408.02032.

The contrast branch reads the same prompt. In every call (the prompt, then each new token) the image tokens are ranked
by the weight, averaged over heads, that the call's last row puts on them in the layer before the first edited one
(layer 1); from layer 2 on, only the `keep` tokens of lowest rank are visible to the rows of the call. Positions do not
change. On equal weights the earlier token ranks lower. Image tokens outside the last row's sliding window are not
ranked and not kept. With at most `keep` image tokens, nothing is dropped. A row that would see nothing (a dropped token
at the very start of a prompt) sees itself.

Then (1 + α) l - α l̃ where l >= max l + ln β.

Differs from the paper in: nothing known. Differs from the authors' code in: their greedy loop has no plausibility cut,
which gives the same token.

Rows: all, because image rows lose columns too; so the prompt runs once per branch. Stages: observe, mask. A sample
without an image is left alone. Cost: a second prompt (the vision pass is shared), and one more row through the weights
per token.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lvlm_jax.attention import Context, Site, Transform
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods.base import Method, Readout, Strength, strength, switch
from lvlm_jax.methods.contrast import ImagePresence, contrast_logits, where_image
from lvlm_jax.methods.depth import layer_range
from lvlm_jax.methods.registry import register


@register("sid")
class SID(Method):
    """Self-introspective decoding; see the module for the formulas."""

    alpha: Strength = strength(0.5, "contrast strength α", low=0)
    beta: Strength = strength(0.1, "plausibility cut β", low=0, high=1, cuts=True)
    keep: Strength = strength(
        100, "how many image tokens the contrast branch keeps, a whole number", low=1, flat="a number of tokens"
    )
    start_layer: int | float = switch(2, "first layer that sees only the kept tokens")
    end_layer: int | float | None = switch(None, "the layer after the last that sees only the kept tokens")
    layers: tuple[int, ...] | None = switch(None, "explicit layers, used instead")

    PRESETS: ClassVar = {"pope": dict(keep=100), "chair": dict(keep=50)}

    def branches(self):
        return (ImagePresence(), LeastAttended(self.keep, self.start_layer, self.end_layer, self.layers))

    def combine(self, readout: Readout, memory):
        combined = contrast_logits(readout.main, readout.contrast, self.alpha, self.beta)
        return where_image(readout.carry, combined, readout.main), memory


@dataclasses.dataclass(frozen=True)
class LeastAttended(Transform):
    """Hides all image tokens except those least attended in the layer before. The carry marks the kept tokens."""

    keep: Strength
    start_layer: int | float
    end_layer: int | float | None
    only: tuple[int, ...] | None

    rows: ClassVar[str] = "all"
    by_rows: ClassVar[bool] = True

    def edited(self, num_layers: int) -> tuple[int, ...]:
        """The layers that see only the kept tokens."""
        layers = layer_range(self.start_layer, self.end_layer, self.only, num_layers)
        if min(layers) == 0:
            raise LVLMError(
                "SID chooses image tokens by the attention of the layer before, and layer 0 has none; "
                "give a start_layer of at least 1"
            )
        return layers

    def active(self, layer: int, num_layers: int, phase: str) -> bool:
        layers = self.edited(num_layers)
        return layer in layers or layer == min(layers) - 1

    def begin(self, context: Context, embeddings) -> Bool[Array, "B S"]:
        return context.image_columns()

    def observe(self, site: Site, weights: Float[Array, "B H R S"]) -> Bool[Array, "B S"]:
        if site.layer != min(self.edited(site.num_layers)) - 1:
            return site.carry
        candidates = site.image & site.mask[:, -1]
        attention = jnp.where(candidates, weights[:, :, -1].mean(axis=1), jnp.inf)
        rank = jnp.argsort(jnp.argsort(attention, axis=-1, stable=True), axis=-1)
        return candidates & (rank < self.keep)

    def mask(self, site: Site, mask):
        if site.layer not in self.edited(site.num_layers):
            return mask
        visible = mask & (site.carry | ~site.image)[:, None, None, :]
        itself = site.row_index[:, None] == jnp.arange(site.image.shape[1])[None, :]
        return visible | (mask & itself & ~visible.any(axis=-1, keepdims=True))
