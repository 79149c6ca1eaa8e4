"""A hash of parameters, by which a run recognises the model that it belongs to."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp


def fingerprint(tree: Any) -> str:
    """SHA-256, in hexadecimal, over the path, shape, dtype and checksum of every array of a tree.

    Checksums are taken where the arrays are, so this costs one pass over the memory, and the fingerprint is the same
    however the arrays are spread over devices and processes. Any change of a single element changes it.
    """
    hasher = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        # One after the other: simulated devices of one machine may wait for each other for ever when many sums are
        # under way at once.
        checksum = int(_checksum(leaf))
        hasher.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} {checksum}\n".encode())
    return hasher.hexdigest()


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    """The sum modulo 2³² of every element's bits, mixed with its place; exact in whatever order it is taken."""
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    # MurmurHash3's last step. It is one to one, so that a change of any single element shows.
    mixed = bits ^ (place * jnp.uint32(0x9E3779B1))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
