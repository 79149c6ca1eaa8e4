"""SEVI: aligns attention heads with the text tokens that visual information has flowed to. arXiv 2505.14257.

In the upper layers, the text after the image already contains the visual information. For the last query row, with
logits z, weights w = softmax(z), 𝒮 the text columns after the last image and 𝒪 all others that the row sees:

    semantic heads  H_S = {h: Σ_𝒮 w_h >= Σ_𝒪 w_h}, the others are H_O
    core heads      H_C = {h in H_S: max_𝒮 w_h > κ Σ_𝒮 w_h}, the other semantic ones are the global heads H_G
    stage 1         h in H_O:  z_h <- (z_h + ω mean of z over H_G) / (1 + ω)
    stage 2         h in H_G:  z_h <- (z_h + ω elementwise maximum of z over H_C) / (1 + ω)

A stage without source or target heads does nothing. Classes and sources come from the original row; whole rows are
mixed, and core heads never change. A sample without an image has no 𝒮 and is left alone.

Rows: the last of the prompt and every decoded one. Layers: from `start_layer` on. Stage: logits.
Cost per token: one more softmax of that row in each such layer.

CICD (`cicd=True`) adds a second branch with another image and no edit. With p, p~ the next-token distributions and J =
min(1, JSD(p, p~)), in nats:

    α = min(3, 1 - log10 J) where J > 1e-4, else 0;    (1 + α) l - α l~ where l >= max l + ln β

`variant="paper"`: JSD = ½ KL(p‖m) + ½ KL(p~‖m), m = (p + p~) / 2; "code": the authors' ½ KL(m‖p) + ½ KL(m‖p~);
"code-qwen": that of their Qwen2-VL files, in which 𝒪 are only the image columns, and CICD acts where J > 0.1.

Differs from the paper in: nothing known. Differs from the authors' code in: the other image, which there is drawn from
the benchmark. Here it is a fixed one, so an answer never depends on its neighbours in a batch. It is resized to each
image that it replaces; if images are split into tiles, each tile shows the whole image. Cost: the prompt and each row
twice.
"""

import functools
from importlib import resources
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from PIL import Image

from lvlm_jax.errors import LVLMError
from lvlm_jax.methods.base import Method, Readout, Strength, data, strength, switch
from lvlm_jax.methods.contrast import contrast_logits, has_image, where_image
from lvlm_jax.methods.depth import layer_range
from lvlm_jax.methods.registry import register
from lvlm_jax.pixels import CLIP

INDISTINCT = {"paper": 1e-4, "code": 1e-4, "code-qwen": 0.1}  # up to this divergence the branches count as equal


@register("sevi")
class SEVI(Method):
    """Heads aligned with the flow of visual information; see the module for the formulas."""

    omega: Strength = strength(4.0, "weight ω of the better heads", low=0, per="head")
    kappa: Strength = strength(0.2, "share of one token that makes a head a core head, κ", low=0, flat="a threshold")
    start_layer: int | float = switch(4, "first edited layer (a float: share of the depth)")
    end_layer: int | float | None = switch(None, "the layer after the last edited one")
    layers: tuple[int, ...] | None = switch(None, "explicit layers instead")
    cicd: bool = switch(False, "contrast with another image", choices=(True, False))
    variant: str = switch(
        "paper",
        "formulas of the paper, of the authors' code, or of their Qwen2-VL files",
        choices=("paper", "code", "code-qwen"),
    )
    alpha_max: Strength = strength(3.0, "largest contrast strength α of CICD", low=0, when=("cicd", True))
    beta: Strength = strength(0.1, "plausibility cut β of CICD", low=0, high=1, cuts=True, when=("cicd", True))
    other_image: Float[Array, "3 Y X"] | None = data(
        "CICD's other image as a processor's pixel values, of any size; default a built-in one"
    )

    rows: ClassVar[str] = "last"
    PRESETS: ClassVar = {
        "focused": dict(omega=4.0, start_layer=4),
        "balanced": dict(omega=0.5, start_layer=8),
        "focused+cicd": dict(omega=4.0, start_layer=4, cicd=True),
        "balanced+cicd": dict(omega=0.5, start_layer=8, cicd=True),
    }

    def active(self, layer, num_layers, phase):
        return layer in layer_range(self.start_layer, self.end_layer, self.layers, num_layers)

    def branches(self):
        return (self, None) if self.cicd else (self,)

    def contrast_prompt(self):
        return "picture" if self.cicd else "same"

    def contrast_picture(self, height, width):
        if self.other_image is None:
            return built_in_picture(height, width)
        if jnp.ndim(self.other_image) != 3 or jnp.shape(self.other_image)[0] != 3:
            raise LVLMError(
                f"SEVI: other_image has shape {jnp.shape(self.other_image)}; expected [3, height, width], a picture's "
                "pixel values as a processor gives them"
            )
        return resized(np.asarray(self.other_image, np.float32), height, width)

    def begin(self, context, embeddings):
        return has_image(context)  # for `combine`

    def logits(self, site, logits):
        others = site.image if self.variant == "code-qwen" else ~site.after_image
        return aligned(logits, site.mask, site.after_image, self.omega, self.kappa, others)[0]

    def combine(self, readout: Readout, memory):
        if readout.contrast is None:
            return readout.main, memory
        divergence = jensen_shannon(readout.main, readout.contrast, self.variant)
        distinct = divergence > INDISTINCT[self.variant]
        alpha = jnp.minimum(self.alpha_max, 1 - jnp.log10(jnp.where(distinct, jnp.minimum(divergence, 1), 1)))
        alpha = jnp.where(distinct, alpha, 0)
        combined = contrast_logits(readout.main, readout.contrast, alpha[:, None], self.beta)
        return where_image(readout.carry, combined, readout.main), memory


class Heads(NamedTuple):
    """The classes of the heads of each row; H_O are the heads that are not semantic."""

    semantic: Bool[Array, "B H R 1"]  # H_S
    core: Bool[Array, "B H R 1"]  # H_C
    distributed: Bool[Array, "B H R 1"]  # H_G


class Moved(NamedTuple):
    """Which heads of each row are changed: those of H_O by stage 1, those of H_G by stage 2."""

    first: Bool[Array, "B H R 1"]
    second: Bool[Array, "B H R 1"]


def classes(
    logits: Float[Array, "B H R S"],
    visible: Bool[Array, "B R S"],
    after: Bool[Array, "B S"],
    kappa: Strength,
    others: Bool[Array, "B S"] | None = None,
) -> Heads:
    """The class of every head, for rows of attention logits.

    Args:
        logits: attention logits of all columns, before the mask.
        visible: which columns a row sees.
        after: columns of text after the last image; the visible ones are 𝒮.
        kappa: share of one token that makes a head a core head, κ.
        others: the columns 𝒪; None for all columns that are not in `after`.
    """
    others = ~after if others is None else others
    visible = visible[:, None]
    after = after[:, None, None, :] & visible
    weights = jax.nn.softmax(jnp.where(visible, logits, jnp.finfo(jnp.float32).min), axis=-1)
    on_text = jnp.where(after, weights, 0).sum(axis=-1, keepdims=True)
    elsewhere = jnp.where(visible & others[:, None, None, :], weights, 0).sum(axis=-1, keepdims=True)
    peak = jnp.where(after, weights, 0).max(axis=-1, keepdims=True)
    semantic = on_text >= elsewhere
    core = semantic & (peak > kappa * on_text)
    return Heads(semantic, core, distributed=semantic & ~core)


def aligned(
    logits: Float[Array, "B H R S"],
    visible: Bool[Array, "B R S"],
    after: Bool[Array, "B S"],
    omega: Strength,
    kappa: Strength,
    others: Bool[Array, "B S"] | None = None,
) -> tuple[Float[Array, "B H R S"], Moved]:
    """Rows of attention logits after both stages, and which heads each stage changed; arguments as for `classes`."""
    heads = classes(logits, visible, after, kappa, others)
    global_count = heads.distributed.sum(axis=1, keepdims=True)
    mean = jnp.where(heads.distributed, logits, 0).sum(axis=1, keepdims=True) / jnp.maximum(global_count, 1)
    any_core = heads.core.any(axis=1, keepdims=True)
    # The second `where` keeps the maximum, and its gradient, finite if there is no core head.
    top = jnp.where(heads.core, logits, -jnp.inf).max(axis=1, keepdims=True)
    top = jnp.where(any_core, top, 0)
    drawn = (logits + omega * jnp.where(heads.semantic, top, mean)) / (1 + omega)
    moved = Moved(~heads.semantic & (global_count > 0), heads.distributed & any_core)
    return jnp.where(moved.first | moved.second, drawn, logits), moved


def jensen_shannon(main: Float[Array, "B V"], contrast: Float[Array, "B V"], variant: str) -> Float[Array, "B"]:
    """Divergence in nats between the distributions of two rows of logits; the module docstring has the variants."""
    log_p, log_q = jax.nn.log_softmax(main), jax.nn.log_softmax(contrast)
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    if variant != "paper":
        return (jnp.exp(log_m) * (log_m - (log_p + log_q) / 2)).sum(axis=-1)
    return (jnp.exp(log_p) * (log_p - log_m) + jnp.exp(log_q) * (log_q - log_m)).sum(axis=-1) / 2


def resized(pixels: Float[np.ndarray, "3 Y X"], height: int, width: int) -> Float[np.ndarray, "3 H W"]:
    """Resizes an image's pixel values, smoothing when it shrinks; bit-equal at its own size."""
    if pixels.shape[1:] == (height, width):
        return pixels
    channels = [Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC) for one in pixels]
    return np.stack([np.asarray(channel) for channel in channels])


@functools.lru_cache(maxsize=16)
def built_in_picture(height: int, width: int) -> np.ndarray:
    """The built-in other image, `Float[3, height, width]`, normalised as by CLIP's processor."""
    with resources.files("lvlm_jax.pocket").joinpath("sample.png").open("rb") as file:
        picture = Image.open(file).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    pixels = (np.asarray(picture, np.float32) / 255 - CLIP.mean) / CLIP.deviation
    return pixels.transpose(2, 0, 1).astype(np.float32)
