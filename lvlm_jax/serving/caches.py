"""A cache of arrays with a limit in bytes; the least recently used entry is dropped first."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import jax


class Cache:
    """Trees of arrays, at most `capacity` bytes together.

    Attributes:
        size: bytes in the cache.
        hits, misses: how often `get` found an entry, and how often not.
    """

    def __init__(self, capacity: int):
        self.capacity, self.size, self.hits, self.misses = capacity, 0, 0, 0
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def get(self, key: Hashable) -> Any | None:
        """The tree under the key, or None."""
        if key not in self._entries:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: Hashable, value: Any) -> None:
        """Stores a tree, unless it is larger than the cache."""
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(value))
        if size > self.capacity or key in self._entries:
            return
        self._entries[key] = value, size
        self.size += size
        while self.size > self.capacity:
            self.size -= self._entries.popitem(last=False)[1][1]
