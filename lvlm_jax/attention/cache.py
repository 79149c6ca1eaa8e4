"""Keys and values that attention reads.

The branches of a generation (one in greedy decoding, two in a contrastive method) share the prompt up to the last
image; each has its own continuation:

    columns    0 ............ P-1 | P ................. P+S-1
    branch 0   shared prefix      | own block 0
    branch 1   shared prefix      | own block 1

The prefix is stored and read once. Without a contrast branch there is no prefix: P = 0, and one own block. The head
axis comes before the position axis because attention reads the keys of one head contiguously.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lvlm_jax.native import write_columns


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
    """Rotated keys and values of consecutive columns, `Float[Array, "B K S D"]` each."""

    key: jax.Array
    value: jax.Array

    @property
    def length(self) -> int:
        return self.key.shape[2]

    def write(self, new: "Block", index: Int[Array, ""]) -> "Block":
        """Overwrites columns `index` to `index + new.length`, in place if the buffer is donated."""

        def update(key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
            return write_columns(key, new.key, index), write_columns(value, new.value, index)

        def guarded(key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
            if key.dtype == jnp.bfloat16:  # written by a call, which XLA does not fuse
                return update(key, value)
            return jax.lax.cond(index < self.length, update, lambda *same: same, key, value)

        # For a batch of one, XLA's CPU compiler fuses a bare update into each of its readers and then copies the whole
        # cache for them. It does not fuse across a conditional. Other platforms do not need it, and would pay a host
        # round trip.
        return Block(*jax.lax.platform_dependent(self.key, self.value, cpu=guarded, default=update))

    def first(self, length: int) -> "Block":
        """The first `length` columns."""
        return Block(self.key[:, :, :length], self.value[:, :, :length])

    def padded(self, length: int) -> "Block":
        """The same columns, followed by zeros to a total of `length` columns."""
        width = ((0, 0), (0, 0), (0, length - self.length), (0, 0))
        return Block(jnp.pad(self.key, width), jnp.pad(self.value, width))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's columns: an optional prefix that all branches share, and one own block per branch."""

    prefix: Block | None
    own: tuple[Block, ...]

    def alone(self, branch: int) -> "LayerCache":
        """A cache with all columns of one branch in one block."""
        own = self.own[branch]
        if self.prefix is not None:
            pairs = ((self.prefix.key, own.key), (self.prefix.value, own.value))
            own = Block(*(jnp.concatenate(parts, axis=2) for parts in pairs))
        return LayerCache(None, (own,))
