"""SPARC: scales up the values of image tokens whose attention suddenly rises. arXiv 2502.01419.

With a_t[j] the head-mean weight of step t's row on image column j in layer 20, and m its running mean (a of the
prompt's last row at first, then m <- (1 - β) a_t + β m), an image token jumps in step t if (a_t - m) / m >= τ. From the
next step on, its value is multiplied by α in every layer, once for each jump:

    w_j <- w_j α^(number of jumps of j so far)

α is 1.1, β 0.1, τ 1.5.

Differs from the authors' code in: nothing known. Their code scales the cached values in place, with the same result.

Rows: every decoded one; the prompt stays plain. Stages: observe (layer 20), weights. A sample without an image is left
alone. Cost: explicit attention in one row; two numbers a column are kept from step to step.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lvlm_jax.attention import Context
from lvlm_jax.methods.base import Method, Strength, data, strength, switch
from lvlm_jax.methods.depth import layer_range
from lvlm_jax.methods.registry import register


class Jumps(NamedTuple):
    """The running mean of each column's attention (0 outside images), and how often each column has jumped."""

    mean: Float[Array, "B S"]
    count: Float[Array, "B S"]


@register("sparc")
class SPARC(Method):
    """Selective progressive attention recalibration; see the module for the formulas."""

    alpha: Strength = strength(1.1, "factor α on a value for each jump of its token", low=0, per="layer")
    beta: Strength = strength(
        0.1, "weight β of the past in the running mean", low=0, high=1, flat="part of a threshold"
    )
    tau: Strength = strength(1.5, "relative rise τ that counts as a jump", low=0, flat="a threshold")
    selected_layer: int | float = switch(20, "the layer whose attention is watched (a float: share of the depth)")
    start_layer: int | float = switch(0, "first layer whose values are scaled")
    end_layer: int | float | None = switch(None, "the layer after the last one")
    layers: tuple[int, ...] | None = switch(None, "explicit layers instead")
    jumps: Any = data("running mean and jumps so far; set by `recall`")

    PRESETS: ClassVar = {"llava-1.5": dict(alpha=1.1, beta=0.1, tau=1.5)}
    rows: ClassVar[str] = "last"

    def watched(self, num_layers: int) -> int:
        """The layer whose attention is observed; static."""
        layer = self.selected_layer
        return layer_range(layer, None, None, num_layers)[0] if isinstance(layer, float) else layer

    def active(self, layer, num_layers, phase):
        scaled = layer_range(self.start_layer, self.end_layer, self.layers, num_layers)
        # An explicit layer that the model does not have is an error.
        watched = layer_range(0, None, (self.watched(num_layers),), num_layers)
        return layer in watched or (phase == "decode" and layer in scaled)

    def begin(self, context: Context, embeddings):
        return None if self.jumps is None else pad_columns(self.jumps, context.image_id.shape[1])

    def observe(self, site, weights):
        if site.layer != self.watched(site.num_layers):
            return site.carry
        attention = jnp.where(site.image & site.mask[:, -1], weights[:, :, -1].mean(axis=1), 0)
        if site.phase == "prefill":
            return Jumps(attention, jnp.zeros_like(attention))
        mean, count = site.carry
        jumped = site.image & (mean > 0) & (attention - mean >= self.tau * mean)
        return Jumps((1 - self.beta) * attention + self.beta * mean, count + jumped)

    def weights(self, site, weights):
        if site.phase == "prefill":
            return weights
        # Jumps of this step count from the next step on.
        count = pad_columns(self.jumps, site.image_id.shape[1]).count
        factor = jnp.where(count > 0, jnp.asarray(self.alpha, jnp.float32) ** count, 1.0)
        return weights * factor[:, None, None]

    def remember(self, carry, previous):
        return carry if previous is None else pad_columns(carry, previous.mean.shape[1])

    def recall(self, previous):
        return dataclasses.replace(self, jumps=previous)


def pad_columns(jumps: Jumps, columns: int) -> Jumps:
    """The same jumps with more columns, which belong to the answer and not to an image."""

    def pad(array: jax.Array) -> jax.Array:
        return jnp.pad(array, ((0, 0), (0, max(columns - array.shape[1], 0))))[:, :columns]

    return Jumps(*map(pad, jumps))
