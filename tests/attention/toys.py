"""Transforms that only tests need."""

from typing import Any

import jax.numpy as jnp

from lvlm_jax.attention import Transform
from lvlm_jax.methods import Method, switch
from lvlm_jax.methods.base import frozen


@frozen
class Edited(Method):
    """A method made of one transform per branch. What the main branch carried through the layers becomes the
    state's memory, where a test can read it."""

    transforms: tuple = switch((), "one per branch")

    def branches(self):
        return self.transforms

    def combine(self, readout, memory):
        return readout.main, readout.carry


class Identity(Transform):
    """Overrides every stage and changes nothing."""

    def __init__(self, rows: str = "post_image"):
        self.rows = rows

    def logits(self, site, logits):
        return logits

    def mask(self, site, mask):
        return mask

    def weights(self, site, weights):
        return weights

    def values(self, site, weights, mix):
        return mix(weights)

    def observe(self, site, weights):
        return site.carry


class Witness(Transform):
    """Carries everything it sees from layer to layer: a tuple with one dict for each layer it was called in."""

    def __init__(self, rows: str = "post_image", only: tuple[int, ...] | None = None, phases=("prefill", "decode")):
        self.rows, self.only, self.phases = rows, only, phases

    def layers(self, num_layers):
        return range(num_layers) if self.only is None else range(self.only[0], self.only[-1] + 1)

    def active(self, layer, num_layers, phase):
        return super().active(layer, num_layers, phase) and phase in self.phases

    def observe(self, site, weights) -> Any:
        names = ("image_id", "image", "after_image", "post_image", "mask", "logits")
        seen = {name: getattr(site, name) for name in names}
        return (*site.carry, seen | {"weights": weights, "layer": jnp.asarray(site.layer)})


class Scale(Transform):
    """Multiplies logits. Counts its calls in its carry."""

    def __init__(self, factor: float, layers: range | None = None, rows: str = "post_image"):
        self.factor, self.only, self.rows = factor, layers, rows

    def layers(self, num_layers):
        return range(num_layers) if self.only is None else self.only

    def begin(self, context, embeddings):
        return jnp.zeros((), jnp.int32)

    def logits(self, site, logits):
        return logits * self.factor

    def observe(self, site, weights):
        return site.carry + 1


class Cap(Transform):
    """Cuts logits at a ceiling, hides column 1 from head 0, halves the weights; carries the sum of weights."""

    def __init__(self, ceiling: float):
        self.ceiling = ceiling

    def begin(self, context, embeddings):
        return jnp.zeros(())

    def logits(self, site, logits):
        return jnp.minimum(logits, self.ceiling)

    def mask(self, site, mask):
        heads, columns = jnp.arange(site.logits.shape[1])[:, None, None], jnp.arange(site.logits.shape[3])
        return mask & ((heads != 0) | (columns != 1))

    def weights(self, site, weights):
        return weights / 2

    def observe(self, site, weights):
        return site.carry + weights.sum()


class Shift(Transform):
    """Adds a number to the outputs."""

    def __init__(self, amount: float):
        self.amount = amount

    def values(self, site, weights, mix):
        return mix(weights) + self.amount
