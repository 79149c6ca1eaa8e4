"""`TowerEdit`: a method's edit of the vision tower that encodes the main branch's images."""

import dataclasses
import hashlib
from collections.abc import Hashable

import jax
import numpy as np
from jaxtyping import Array, Float


class TowerEdit:
    """Base class: changes nothing. A subclass is a frozen dataclass and a pytree (`jax.tree_util.register_dataclass`).

    Image tokens are cached under `edit_key`, so the leaves should be exactly the values on which the tokens depend.
    """

    def mlp(self, layer: int, output: Float[Array, "R P W"]) -> Float[Array, "R P W"]:
        """The output of a layer's feed-forward block, before it is added to the stream.

        Args:
            layer: layer of the tower, from 0.
            output: the unedited output. It has all positions of a row, class token and filler included, or a part of
                them; so an edit must treat each position by itself.
        """
        return output


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TowerEdits(TowerEdit):
    """Several edits, one after another."""

    members: tuple[TowerEdit, ...]

    def mlp(self, layer, output):
        for member in self.members:
            output = member.mlp(layer, output)
        return output


def edit_key(edit: TowerEdit | None) -> Hashable:
    """A key that is equal for edits with equal results; None for no edit."""
    if edit is None:
        return None
    leaves, structure = jax.tree.flatten(edit)
    content = hashlib.blake2b(digest_size=16)
    for leaf in map(np.asarray, leaves):
        content.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
    return structure, content.digest()
