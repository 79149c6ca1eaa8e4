"""Strengths with one value per layer, or per layer and head, instead of one number for the whole model."""

import copy
import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from lvlm_jax.attention.transform import Transform
from lvlm_jax.errors import LVLMError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layered:
    """A strength with a value for each layer, used in place of a number. Each layer's stages see their own value.

    Attributes:
        values: one per layer, `Float[L]`, or one per layer and query head, `Float[L H]`.
    """

    values: Any  # an array, or whatever JAX puts in its place while it rebuilds a tree

    def at(self, layer: int, num_layers: int) -> Float[Array, "..."]:
        """The value for a layer; `[H, 1, 1]` if there is one per head, to be multiplied with `[B, H, R, S]`.

        Raises:
            LVLMError: the number of values is not the number of layers.
        """
        count = self.values.shape[0]
        if count != num_layers:
            raise LVLMError(f"a strength has {count} values and the model {num_layers} layers; give one for each layer")
        value = self.values[layer]
        return value[:, None, None] if value.ndim else value

    def record(self) -> list:
        """The values as the record of a run stores them."""
        return np.asarray(self.values).tolist()


def at_layer(transform: Any, layer: int, num_layers: int) -> Any:
    """Replaces every `Layered` strength of a transform by its value for a layer."""
    if isinstance(transform, Layered):
        return transform.at(layer, num_layers)
    if isinstance(transform, tuple):
        members = tuple(at_layer(member, layer, num_layers) for member in transform)
        return members if any(new is not old for new, old in zip(members, transform, strict=True)) else transform
    if not isinstance(transform, Transform) or not dataclasses.is_dataclass(transform):
        return transform
    values = {}
    for field in dataclasses.fields(transform):
        before = getattr(transform, field.name)
        after = at_layer(before, layer, num_layers)
        if after is not before:
            values[field.name] = after
    if not values:
        return transform
    own = copy.copy(transform)  # not `replace`, which would validate the arrays like user input
    for name, value in values.items():
        object.__setattr__(own, name, value)
    return own
