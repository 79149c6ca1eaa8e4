"""CLVA: pulls the attention of deep layers back to the image tokens that middle layers attended to. A reconstruction.

The paper (arXiv 2603.25088) describes the idea in words; the formulas are ours, so figures measured with this file are
figures of the reconstruction. For the last query row, inside each image of N tokens, L layers:

    p^l   maximum over heads of the weights on the image's columns, normalised to sum 1
    n     noise of the first layers: mean of p^0, p^1, p^2
    l*    the layer in [0.3 L, 0.6 L] with the largest JSD(p^l, n) (1 - H(p^l) / ln N), the first on ties
    A     anchors: relu(p^l* - λ n), normalised, of which the largest ρN entries (rounded down, at least one) are kept
    R     noise map: relu(n - A), normalised
    g     drift in a layer l >= 0.65 L: clip(cos(p^l, n) - cos(p^l, A), 0, 1);  1 with `gate=False`
    z_j   <- z_j + g (a A_j / max A - b R_j / max R) before the softmax of that layer

A difference of two maps (each of sum 1) whose entries sum to at most 1e-4 counts as zero: it is rounding. An image
whose A is zero has no anchors and is left alone, and so is an image that the row does not see. JSD is in nats: the
mean of the two divergences from the mean of the maps. Candidates for l* begin with the last layer of n.

Differs from the paper in: unknown, because the paper gives no formulas; no authors' code is known.

Rows: the last of the prompt and every decoded one. Stages: observe (n, anchors), logits (the edit); the state flows
from layer to layer of one pass and nothing is kept between steps. Cost per token: one more softmax of the row in the
edited layers and one sort of the columns; nothing of size S x S. The noise layers and the candidates store one maximum
per column each, and all statistics of the candidates are computed at once.
"""

import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lvlm_jax.attention import Site
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods import per_image
from lvlm_jax.methods.base import Method, Strength, strength, switch
from lvlm_jax.methods.depth import layer_range
from lvlm_jax.methods.registry import register

EDIT_FROM = 0.65  # share of the depth
FAINT = 1e-4  # a difference of maps with a smaller sum counts as zero
ROUNDING = 1e-9  # 0.6 * 5 layers is layer 3, despite floating point


class Anchors(NamedTuple):
    """Data for the edited layers; zero for images without anchors.

    Attributes:
        away: n / |n| - A / |A|; its product with a unit vector says how far the vector has drifted.
        push: a A / max A - b R / max R, the change of the logits at full drift.
    """

    away: Float[Array, "B S"]
    push: Float[Array, "B S"]


@register("clva")
class CLVA(Method):
    """Cross-layer visual anchors, a reconstruction; see the module for the formulas."""

    a: Strength = strength(1.0, "how much anchors are raised, a", low=0)
    b: Strength = strength(0.5, "how much the noise of the first layers is lowered, b", low=0)
    lambda_: Strength = strength(1.0, "share λ of the noise taken from the anchor layer", low=0)
    rho: Strength = strength(
        0.1, "share ρ of the image's tokens that may be anchors", low=0, high=1, flat="a number of tokens"
    )
    gate: bool = switch(True, "edit only as far as attention has drifted", choices=(True, False))
    noise_layers: int = switch(3, "how many first layers make the noise")
    anchor_start: float = switch(0.3, "share of the depth where candidates for the anchor layer begin, inclusive")
    anchor_end: float = switch(0.6, "share of the depth where candidates for the anchor layer end, inclusive")
    start_layer: int | float | None = switch(None, "first edited layer; default the first at 0.65 of the depth")
    end_layer: int | float | None = switch(None, "the layer after the last edited one")
    layers: tuple[int, ...] | None = switch(None, "explicit edited layers instead")

    rows: ClassVar[str] = "last"

    def candidates(self, num_layers: int) -> range:
        """The layers among which the anchor layer is chosen; static."""
        start, end = (min(max(share, 0.0), 1.0) for share in (self.anchor_start, self.anchor_end))
        first = max(math.ceil(start * num_layers - ROUNDING), self.noise_layers - 1)
        return range(first, math.floor(end * num_layers + ROUNDING) + 1)

    def edited(self, num_layers: int) -> tuple[int, ...]:
        """The layers whose logits change; static.

        Raises:
            LVLMError: the model is too shallow, or an edited layer comes before the anchors are known.
        """
        candidates = self.candidates(num_layers)
        start = self.start_layer
        if start is None:
            start = math.ceil(EDIT_FROM * num_layers - ROUNDING)
        edited = layer_range(start, self.end_layer, self.layers, num_layers)
        if self.noise_layers < 1 or not candidates or min(edited) <= candidates[-1]:
            raise LVLMError(
                f"CLVA in {num_layers} layers: noise from the first {self.noise_layers}, anchors from "
                f"{list(candidates) or 'none'}, edits in {list(edited)}; expected each to come after the one before"
            )
        return edited

    def active(self, layer, num_layers, phase):
        edited = self.edited(num_layers)
        return layer < self.noise_layers or layer in self.candidates(num_layers) or layer in edited

    def observe(self, site, weights):
        # Until the anchors are known, the carry is a tuple of head maxima, one per noise or candidate layer.
        candidates = self.candidates(site.num_layers)
        if site.layer >= self.noise_layers and site.layer not in candidates:
            return site.carry
        peaks = (*site.carry, head_maxima(site, weights))
        return self._anchors(site, peaks, len(candidates)) if site.layer == candidates[-1] else peaks

    def logits(self, site, logits):
        if site.layer not in self.edited(site.num_layers):
            return logits
        masked = jnp.where(site.mask[:, None], logits, jnp.finfo(jnp.float32).min)
        peak = head_maxima(site, jax.nn.softmax(masked, axis=-1))
        inside = per_image.members(site.image_id, site.image_count)
        squares = per_image.sums(inside, peak**2)
        drift = 1.0
        if self.gate:
            lengths = jnp.sqrt(jnp.where(squares > 0, squares, 1))
            drift = jnp.clip(per_image.sums(inside, peak * site.carry.away) / lengths, 0, 1)
        push = per_image.spread(inside, jnp.where(squares > 0, drift, 0.0)) * site.carry.push
        return logits + push[:, None, None, :]

    def _anchors(self, site: Site, peaks: tuple[Float[Array, "B S"], ...], candidates: int) -> Anchors:
        """Anchors of each image, from the head maxima of the noise layers and of the last `candidates` layers."""
        inside = per_image.members(site.image_id, site.image_count)
        focus = jax.vmap(lambda peak: per_image.normalised(inside, peak))(jnp.stack(peaks))
        noise, focus = focus[: self.noise_layers].mean(axis=0), focus[-candidates:]
        scores = jax.vmap(lambda one: anchor_score(inside, one, noise))(focus)
        best = per_image.spread(inside, scores.argmax(axis=0))
        focus_of_best = jnp.take_along_axis(focus, best[None], axis=0)[0]

        anchor = per_image.normalised(inside, jax.nn.relu(focus_of_best - self.lambda_ * noise), FAINT)
        anchors = per_image.largest(site.image_id, inside, anchor, per_image.share(self.rho, inside))
        anchor = jnp.where(anchors, anchor, 0)
        regressive = per_image.normalised(inside, jax.nn.relu(noise - anchor), FAINT)
        anchored = per_image.spread(inside, per_image.sums(inside, anchor) > 0)
        push = self.a * over_maximum(inside, anchor) - self.b * over_maximum(inside, regressive)
        return Anchors(
            away=jnp.where(anchored, unit(inside, noise) - unit(inside, anchor), 0), push=jnp.where(anchored, push, 0)
        )


def head_maxima(site: Site, weights: Float[Array, "B H 1 S"]) -> Float[Array, "B S"]:
    """The largest weight of any head on each image column, 0 elsewhere; p before normalisation."""
    return jnp.where(site.image & site.mask[:, -1], weights[:, :, -1].max(axis=1), 0)


def anchor_score(
    inside: Bool[Array, "B I S"], focus: Float[Array, "B S"], noise: Float[Array, "B S"]
) -> Float[Array, "B I"]:
    """JSD(p, n) (1 - H(p) / ln N) of each image."""
    middle = (focus + noise) / 2
    divergence = times_log(focus) + times_log(noise) - 2 * times_log(middle)
    entropy = -per_image.sums(inside, times_log(focus))
    count = inside.sum(axis=-1)
    certainty = jnp.where(count > 1, 1 - entropy / jnp.log(jnp.maximum(count, 2)), 0)
    return per_image.sums(inside, divergence) / 2 * certainty


def times_log(values: Float[Array, "B S"]) -> Float[Array, "B S"]:
    """x ln x, 0 at 0."""
    return jnp.where(values > 0, values * jnp.log(jnp.where(values > 0, values, 1)), 0)


def unit(inside: Bool[Array, "B I S"], values: Float[Array, "B S"]) -> Float[Array, "B S"]:
    """Values divided by their Euclidean length in each image; zero vectors stay zero."""
    squares = per_image.spread(inside, per_image.sums(inside, values**2))
    return values / jnp.sqrt(jnp.where(squares > 0, squares, 1))


def over_maximum(inside: Bool[Array, "B I S"], values: Float[Array, "B S"]) -> Float[Array, "B S"]:
    """Non-negative values divided by the largest in their image; 0 in an image without positive values."""
    top = per_image.spread(inside, per_image.maxima(inside, values))
    return jnp.where(top > 0, values / jnp.where(top > 0, top, 1), 0)
