"""Strengths that are not one number for the whole model: one for each layer, or one for each layer and head."""

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
    """A strength by layer; stands where a number would. A layer's stages find their own value in its place.

    Attributes:
        values: one for each layer, `Float[L]`, or for each layer and query head, `Float[L H]`.
    """

    values: Any  # an array, or what JAX puts in its place while it rebuilds a tree

    def at(self, layer: int, num_layers: int) -> Float[Array, "..."]:
        """The value of a layer, or `[H, 1, 1]` for its heads, to be multiplied with `[B, H, R, S]`.

        Raises:
            LVLMError: the values are those of a model of another depth.
        """
        given = self.values.shape[0]
        if given != num_layers:
            raise LVLMError(f"a strength has {given} values and the model {num_layers} layers; give one for each layer")
        value = self.values[layer]
        return value[:, None, None] if value.ndim else value

    def record(self) -> list:
        """What the record of a run says of it."""
        return np.asarray(self.values).tolist()


def at_layer(transform: Any, layer: int, num_layers: int) -> Any:
    """A transform with the values of a layer in the place of its `Layered` strengths; itself where it has none."""
    if isinstance(transform, Layered):
        return transform.at(layer, num_layers)
    if isinstance(transform, tuple):
        members = tuple(at_layer(member, layer, num_layers) for member in transform)
        return members if any(new is not old for new, old in zip(members, transform, strict=True)) else transform
    if not isinstance(transform, Transform) or not dataclasses.is_dataclass(transform):
        return transform
    changed = {}
    for field in dataclasses.fields(transform):
        before = getattr(transform, field.name)
        after = at_layer(before, layer, num_layers)
        if after is not before:
            changed[field.name] = after
    if not changed:
        return transform
    own = copy.copy(transform)  # and not `replace`, which would check what is no longer a user's
    for name, value in changed.items():
        object.__setattr__(own, name, value)
    return own
