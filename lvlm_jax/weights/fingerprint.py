"""A hash of parameters, with which a run recognises its model."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp


def fingerprint(tree: Any) -> str:
    """SHA-256, in hexadecimal, over the path, shape, dtype and checksum of every array of a tree.

    Checksums are computed on the arrays' devices, which costs one pass over the memory. The fingerprint does not depend
    on how arrays are spread over devices and processes. A change of any single element changes it.
    """
    hasher = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        # One after the other: simulated devices of one machine may deadlock when many sums run at once.
        checksum = int(_checksum(leaf))
        hasher.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} {checksum}\n".encode())
    return hasher.hexdigest()


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    """The sum modulo 2³² of every element's bits, mixed with its index; exact whatever the order of summation."""
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    # MurmurHash3's last step, which is one-to-one: a change of any single element changes the sum.
    mixed = bits ^ (place * jnp.uint32(0x9E3779B1))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
