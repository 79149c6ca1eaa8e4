"""CMAC: contrast against a value-masked branch (IMD), on calibrated positions (CMPC). arXiv 2501.01926.

CMPC, both branches, every layer. With c(p) the number of image tokens before position p,

    P^c(p) = p - (1 - 1/γ) c(p)

are the positions at which rows after the last image see image tokens; all other logits keep the ordinary positions.
P^c(i) - i is the same for all those rows i, and rotary attention depends only on differences. So it is enough to rotate
the cached image keys once, after the prompt, by P^c(j) - j - (P^c(i) - i) = (1 - 1/γ)(N - c(j)).

IMD, contrast branch, every layer. X are the logits of post-image rows on image columns, θ their mean over heads,
rows and columns (one scalar per sample, layer and call), M = 1[X > θ]:

    O~ = (w ∘ (1 - M)) V + (Σ_j (w ∘ M)_j) v̄

with v̄ the mean value over the image tokens of each head. This is linear in V, so the code edits the weights: masked
mass is spread evenly over the image tokens. `variant="code"` replaces v̄ by its mean over channels.

Contrast: (1 + α) l - α l̃ where l >= max l + ln β. Without IMD there is no contrast branch: the logits are those of
the calibrated main branch, uncut.

The gate sets α to 0 at steps whose mean image logit s_t lies below the mean of s over 30 steps, the step itself
included: gate="first" takes the first 30 steps, as the authors' sampling loop does, gate="last" the newest 30, as their
greedy loop does. Their scripts use it only for CHAIR, so it is off except in the CHAIR presets of `variant="code"`.

Differs from the paper in: nothing known. Differs from the authors' code in: statistics are per sample (theirs pool
the batch). Their InstructBLIP program has CMPC off (here `cmpc=False`) and pools θ over prompt and generated rows (not
here). Their Qwen-VL program counts text positions twice and image positions once, divides by 3, and moves the image
markers too (not here).

Rows before the last image's end are the same in both branches and computed once.
Cost per token: one more row through the weights; the prompt's keys and values are read once for both branches.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lvlm_jax.attention import Context, Site, Transform
from lvlm_jax.methods.base import Method, Strength, strength, switch
from lvlm_jax.methods.contrast import contrast_logits
from lvlm_jax.methods.registry import register

GATE_STEPS = 30


@register("cmac")
class CMAC(Method):
    """Cross-modal attention calibration; see the module for the formulas."""

    alpha: Strength = strength(3.0, "contrast strength α", low=0, when=("imd", True))
    beta: Strength = strength(0.2, "plausibility cut β", low=0, high=1, cuts=True, when=("imd", True))
    gamma: Strength | None = strength(
        None, "position scale γ of image tokens; default 2 (paper), 3 (code)", low=1e-6, when=("cmpc", True)
    )
    variant: str = switch("paper", "formulas of the paper or of the authors' code", choices=("paper", "code"))
    imd: bool = switch(True, "value-masked contrast branch", choices=(True, False))
    cmpc: bool = switch(True, "calibrated positions", choices=(True, False))
    distort: str = switch(
        "value_mask",
        "what the contrast branch does where M is 1",
        choices=("value_mask", "attention_mask", "value_noise"),
    )
    gate: str | None = switch(
        None,
        "α is 0 at steps whose image logit is below its mean over the first or the last 30",
        choices=(None, "first", "last"),
    )
    noise_seed: Strength = strength(
        0, "seed of distort='value_noise'", low=0, high=2**24, flat="a seed", when=("distort", "value_noise")
    )

    PRESETS: ClassVar = {
        "llava-1.5/pope": dict(alpha=3.0, beta=0.2),
        "llava-1.5/chair": dict(alpha=1.0, beta=0.2),
        "llava-1.5/mme": dict(alpha=1.0, beta=0.5),
        "instructblip/pope": dict(alpha=3.0, beta=0.3),
        "instructblip/chair": dict(alpha=1.0, beta=0.3),
        "instructblip/mme": dict(alpha=0.5, beta=0.5),
        "qwen-vl/pope": dict(alpha=3.0, beta=0.2),
    }

    @classmethod
    def preset_settings(cls, name, changes):
        settings = super().preset_settings(name, changes)
        # The authors' CHAIR scripts sample, so they use the gate of the sampling loop.
        gated = name.endswith("/chair") and settings.get("variant") == "code"
        return {"gate": "first", **settings} if gated else settings

    def __post_init__(self):
        if self.gamma is None:
            object.__setattr__(self, "gamma", 2.0 if self.variant == "paper" else 3.0)
        if isinstance(self.gate, bool):  # scripts may pass a bool
            object.__setattr__(self, "gate", "first" if self.gate else None)
        super().__post_init__()

    def branches(self) -> tuple[Transform | None, ...]:
        if not self.imd:
            return (None,)
        main = ImageLogitMean() if self.gate else None
        if self.distort == "attention_mask":
            return (main, AttentionMask())
        if self.distort == "value_noise":
            return (main, ValueNoise(self.noise_seed))
        return (main, ValueMask() if self.variant == "paper" else ScalarValueMask())

    def positions(self, position, images_before, image_tokens):
        if not self.cmpc:
            return None
        # P^c(j) of image token j, minus P^c(i) - i, which is the same for every post-image row i.
        return position + (1 - 1 / self.gamma) * (image_tokens - images_before)

    def start(self, batch: int) -> Any:
        if not (self.imd and self.gate):
            return ()
        return (jnp.zeros((batch, GATE_STEPS)), jnp.zeros((batch,), jnp.int32))

    @property
    def independent_rows(self) -> bool:
        # Value noise is drawn for all rows at once, from the column number.
        return not (self.imd and self.distort == "value_noise")

    def combine(self, readout, memory):
        main, contrast, carry = readout.main, readout.contrast, readout.carry
        if contrast is None:
            return main, memory
        alpha = self.alpha
        if self.gate:
            scores, steps = memory
            place = jnp.arange(GATE_STEPS) == (steps % GATE_STEPS)[:, None]
            counted = place if self.gate == "last" else place & (steps < GATE_STEPS)[:, None]
            scores = jnp.where(counted, carry[:, None], scores)
            mean = scores.sum(axis=1) / jnp.minimum(steps + 1, GATE_STEPS)
            memory = (scores, steps + 1)
            alpha = jnp.where(carry < mean, 0.0, alpha)[:, None]
        return contrast_logits(main, contrast, alpha, self.beta), memory


def image_block(site: Site) -> Bool[Array, "B 1 R S"]:
    """Post-image rows x image columns, without columns that a row cannot see (sliding window)."""
    return (site.post_image[:, :, None] & site.image[:, None, :] & site.mask)[:, None]


def image_logits(site: Site) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """The sum of the logits in `image_block` over heads, rows and columns, and the number of these logits."""
    block = image_block(site)
    count = block.sum(axis=(1, 2, 3)).astype(jnp.float32) * site.logits.shape[1]
    return jnp.where(block, site.logits, 0).sum(axis=(1, 2, 3)), count


def above_mean(site: Site, logits: tuple[Float[Array, "B"], Float[Array, "B"]]) -> Bool[Array, "B H R S"]:
    """M: where logits in `image_block` exceed their mean; `logits` is the result of `image_logits` for all rows."""
    total, count = logits
    theta = total / jnp.maximum(count, 1)
    return image_block(site) & (site.logits > theta[:, None, None, None])


def image_uniform(site: Site) -> Float[Array, "B 1 1 S"]:
    """Equal weights over the image columns, which give the mean value v̄."""
    count = jnp.maximum(site.image.sum(axis=-1, keepdims=True), 1)
    return (site.image / count)[:, None, None, :]


def masked_mass(weights: Float[Array, "B H R S"], mask: Bool[Array, "B H R S"]) -> Float[Array, "B H R 1"]:
    """How much weight each row puts on masked columns."""
    return jnp.where(mask, weights, 0).sum(axis=-1, keepdims=True)


class ValueMask(Transform):
    """IMD: the values of masked positions become the image's mean value."""

    by_rows: ClassVar[bool] = True

    def statistics(self, site, weights):
        return image_logits(site)

    def weights(self, site, weights):
        mask = above_mean(site, self.over_all_rows(site, weights))
        return jnp.where(mask, 0, weights) + masked_mass(weights, mask) * image_uniform(site)


class ScalarValueMask(Transform):
    """IMD as coded by the authors: masked values become one number per head, a mean over image tokens and channels."""

    by_rows: ClassVar[bool] = True

    def statistics(self, site, weights):
        return image_logits(site)

    def values(self, site, weights, mix):
        mask = above_mean(site, self.over_all_rows(site, weights))
        # The values are summed before the division: ones are exact in every dtype, and 1 / N is not.
        image = site.image[:, None, None, :].astype(jnp.float32)
        total = mix(jnp.broadcast_to(image, (*weights.shape[:2], 1, weights.shape[3])))
        mean = total.mean(axis=-1, keepdims=True) / jnp.maximum(image.sum(axis=-1, keepdims=True), 1)
        return mix(jnp.where(mask, 0, weights)) + masked_mass(weights, mask) * mean


class AttentionMask(Transform):
    """Ablation: masked positions are hidden before the softmax."""

    def mask(self, site, mask):
        return mask & ~above_mean(site, image_logits(site))


@dataclasses.dataclass(frozen=True)
class ValueNoise(Transform):
    """Ablation: the values of masked positions become Gaussian noise.

    In each head, the noise has the mean and the deviation of the values of image tokens, over tokens and channels.
    """

    seed: Strength

    def begin(self, context: Context, embeddings):
        # The first row's column differs in every call, so every step draws new noise.
        return jax.random.fold_in(jax.random.key(jnp.asarray(self.seed).astype(jnp.uint32)), context.first_row)

    def values(self, site, weights, mix):
        values = site.read_values().astype(jnp.float32)
        image = site.image[:, None, :, None]
        count = jnp.maximum(image.sum(axis=(2, 3), keepdims=True) * values.shape[-1], 1)
        mean = jnp.where(image, values, 0).sum(axis=(2, 3), keepdims=True) / count
        variance = jnp.where(image, (values - mean) ** 2, 0).sum(axis=(2, 3), keepdims=True) / count
        key = jax.random.fold_in(site.carry, site.layer)
        noise = mean + jnp.sqrt(variance) * jax.random.normal(key, values.shape)
        mask = above_mean(site, image_logits(site))
        batch, heads, rows, columns = weights.shape
        distorted = jnp.where(mask, weights, 0).reshape(batch, values.shape[1], -1, columns)
        replaced = jnp.einsum("BKRS,BKSD->BKRD", distorted, noise).reshape(batch, heads, rows, -1)
        return mix(jnp.where(mask, 0, weights)) + replaced


@dataclasses.dataclass(frozen=True)
class ImageLogitMean(Transform):
    """Computes s_t: the last row's image logits, summed over columns, averaged over heads and layers."""

    rows: ClassVar[str] = "last"

    def begin(self, context: Context, embeddings):
        return jnp.zeros(context.image_id.shape[0])

    def observe(self, site, weights):
        visible = (site.image & site.mask[:, -1])[:, None]
        last = jnp.where(visible, site.logits[:, :, -1], 0).sum(axis=-1)
        return site.carry + last.mean(axis=-1) / site.num_layers
