"""VAR: moves attention from visual sinks to the rest of the image. arXiv 2503.03321.

A token is a sink of layer l if |RMSnorm(h)[d]| > τ for a sink dimension d, where h is the layer's input and the norm
has no weight. Sinks are determined in the prompt and stay fixed. Sink dimensions depend on the decoder: 2533 and 1415
in LLaMA-2-7B, 2100 and 4743 in 13B (`dims`, presets); by default, the two largest dimensions of the sample's first
token in that layer. If a layer has a sink among the image tokens, a head is image-centric in a row after the images if
its mass on image columns is at least 0.2 and the sinks' share of that mass at most ρ. In such heads

    w_s <- p w_s                                   on sinks, in image and text
    w_j <- w_j + (1 - p) Σ_s w_s · w_j / Σ_k w_k   on the image columns j that are not sinks, k over all of these

τ is 20, ρ 0.5, p 0.6; layers 2 to L - 2.

Differs from the authors' code in: the authors add 1e-6 to every image column when they compute the share. They give
sink dimensions for two decoders; the default here is our own.

Rows: after the last image, prompt and decoded. Stages: enter (sinks), weights. A sample without an image is left alone.
Cost: explicit attention in those rows; one bit per layer and column is stored.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lvlm_jax.methods.base import Method, Strength, data, strength, switch
from lvlm_jax.methods.depth import layer_range
from lvlm_jax.methods.registry import register

EPSILON = 1e-6  # of the norm


@register("var")
class VAR(Method):
    """Visual attention redistribution; see the module for the formulas."""

    p: Strength = strength(0.6, "share p of its weight that a sink keeps", low=0, high=1, per="head")
    rho: Strength = strength(
        0.5, "largest share ρ of sinks in an image-centric head's image mass", low=0, high=1, flat="a threshold"
    )
    tau: Strength = strength(20, "size τ from which a dimension makes a sink", low=0, flat="a threshold")
    least: Strength = strength(
        0.2, "smallest mass of an image-centric head on image columns", low=0, high=1, flat="a threshold"
    )
    dims: tuple[int, ...] | None = switch(None, "sink dimensions; by default the two largest of the first token")
    start_layer: int | float = switch(2, "first edited layer (a float: share of the depth)")
    end_layer: int | float | None = switch(None, "the layer after the last edited one; by default the last layer")
    layers: tuple[int, ...] | None = switch(None, "explicit layers instead")
    sinks: jax.Array | None = data("sinks of every sample and edited layer; set by `recall`")

    PRESETS: ClassVar = {"llava-1.5-7b": dict(dims=(2533, 1415)), "llava-1.5-13b": dict(dims=(2100, 4743))}
    rows: ClassVar[str] = "post_image"
    by_rows: ClassVar[bool] = True

    def edited(self, num_layers: int) -> tuple[int, ...]:
        """The layers whose weights change; static."""
        end = num_layers - 1 if self.end_layer is None else self.end_layer
        return layer_range(self.start_layer, end, self.layers, num_layers)

    def active(self, layer, num_layers, phase):
        return layer in self.edited(num_layers)

    def begin(self, context, embeddings):
        # The column of a sample's first token, then the sinks of each edited layer.
        return ((context.image_id >= 0).argmax(axis=1),)

    def enter(self, stream):
        if stream.phase == "decode" or stream.layer not in self.edited(stream.num_layers):
            return stream.carry
        hidden = stream.layer_input.astype(jnp.float32)
        sizes = jnp.abs(hidden * jax.lax.rsqrt((hidden**2).mean(axis=-1, keepdims=True) + EPSILON))
        if self.dims is None:
            first = jnp.take_along_axis(sizes, stream.carry[0][:, None, None], axis=1)[:, 0]
            dims = jax.lax.top_k(first, 2)[1]
        else:
            dims = jnp.broadcast_to(jnp.asarray(self.dims), (hidden.shape[0], len(self.dims)))
        largest = jnp.take_along_axis(sizes, dims[:, None], axis=2).max(axis=-1)
        return (*stream.carry, largest > self.tau)

    def weights(self, site, weights):
        columns = site.image_id.shape[1]
        if site.phase == "prefill":
            sinks = site.carry[-1]
        else:
            place = self.edited(site.num_layers).index(site.layer)
            sinks = jnp.pad(self.sinks[:, place], ((0, 0), (0, columns - self.sinks.shape[2])))
        sinks &= site.image_id >= 0
        mass, on_sinks = _sum(weights, site.image), _sum(weights, site.image & sinks)
        centric = (mass >= self.least) & (on_sinks <= self.rho * mass) & site.post_image[:, None, :, None]
        centric &= (site.image & sinks).any(axis=-1)[:, None, None, None]
        released = (1 - self.p) * _sum(weights, sinks)
        rest = mass - on_sinks
        grown = weights * (1 + released / jnp.where(rest > 0, rest, 1))
        receives = (site.image & ~sinks)[:, None, None]
        result = jnp.where(sinks[:, None, None], self.p * weights, jnp.where(receives, grown, weights))
        return jnp.where(centric & (rest > 0), result, weights)

    @property
    def step_by_step(self) -> bool:
        return False

    def remember(self, carry, previous):
        return jnp.stack(carry[1:], axis=1) if previous is None else previous

    def recall(self, previous):
        return dataclasses.replace(self, sinks=previous)


def _sum(weights: Float[Array, "B H R S"], columns: Bool[Array, "B S"]) -> Float[Array, "B H R 1"]:
    return jnp.where(columns[:, None, None], weights, 0).sum(axis=-1, keepdims=True)
