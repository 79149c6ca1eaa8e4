"""Losses and metrics as (sum, count) pairs, so that parts of a batch and of a data set add up exactly."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Mean(NamedTuple):
    """A mean in progress: add two of them with `+`, divide at the end."""

    total: Any  # arrays, or whatever JAX puts in their place while it rebuilds a tree
    count: Any

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> jax.Array:
        """The mean; 0 if the count is 0."""
        return self.total / jnp.maximum(self.count, 1)


def cross_entropy(
    logits: Float[Array, "*T V"], targets: Int[Array, "*T"], mask: Bool[Array, "*T"] | Float[Array, "*T"]
) -> Mean:
    """Cross entropy in nats over the targets; `mask` selects or weights them."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    weight = mask.astype(jnp.float32)
    return Mean(jnp.sum((jax.nn.logsumexp(logits, axis=-1) - chosen) * weight), jnp.sum(weight))


def accuracy(
    logits: Float[Array, "*T V"], targets: Int[Array, "*T"], mask: Bool[Array, "*T"] | Float[Array, "*T"]
) -> Mean:
    """Share of the selected targets that have the highest logit."""
    weight = mask.astype(jnp.float32)
    return Mean(jnp.sum((jnp.argmax(logits, axis=-1) == targets) * weight), jnp.sum(weight))
