"""A cache of arrays by content, bounded in bytes: what was used longest ago goes first."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np


def digest(parts: Iterable[Any]) -> bytes:
    """A key for arrays, texts and numbers: equal content has an equal key."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            found.update(f"{part.dtype}{part.shape}".encode())
            found.update(np.ascontiguousarray(part).data)
        else:
            found.update(repr(part).encode())
    return found.digest()


class Cache:
    """Trees of arrays, at most `capacity` bytes together.

    Attributes:
        size: bytes held.
        hits, misses: how often `get` found something, and did not.
    """

    def __init__(self, capacity: int):
        self.capacity, self.size, self.hits, self.misses = capacity, 0, 0, 0
        self._kept: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()

    def get(self, key: bytes) -> Any | None:
        """What was kept under the key; None without."""
        if key not in self._kept:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: bytes, value: Any) -> None:
        """Keeps a tree, unless it is larger than the cache."""
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(value))
        if size > self.capacity or key in self._kept:
            return
        self._kept[key] = value, size
        self.size += size
        while self.size > self.capacity:
            self.size -= self._kept.popitem(last=False)[1][1]
