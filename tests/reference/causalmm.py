"""CausalMM in plain NumPy float64, one sample at a time.

Attention is shuffled by an order that layer and seed give: places are sorted by a hash of 32 bits.
"""

import numpy as np

from tests.reference import llava, one_branch
from tests.reference.contrast import alone, changed_prompt

MASK = 0xFFFFFFFF


def hashed(place, layer, seed):
    """A whole number below 2**32 for each place."""
    x = (place * 0x9E3779B1 + (layer + 1) * 0x85EBCA6B + seed * 0xC2B2AE35) & MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def shuffled(row, seen, layer, seed):
    """Weights [H, S] shuffled over visible columns: the n-th column gets those of the n-th in the hash's order."""
    columns = np.flatnonzero(seen)
    order = sorted(columns, key=lambda column: hashed(int(column), layer, seed))
    moved = row.copy()
    moved[:, columns] = row[:, order]
    return moved


class Shuffled:
    """A decoder whose rows after the images attend in a shuffled way; a method of `one_branch`."""

    def __init__(self, seed):
        self.seed = seed

    def weights(self, call, z):
        w = one_branch.softmax_seen(call, z)
        images = np.flatnonzero(call.image_id > 0)
        for index, row in enumerate(call.rows):
            if len(images) and row > images[-1]:
                w[:, index] = shuffled(w[:, index], call.seen[index], call.layer, self.seed)
        return w


def run(weights, config, ids, pixels, tokens, gamma=0.5, beta=0.1, seed=0):
    """main, contrast (of the tower), combined, distances to the cut, each [1 + len(tokens), V]."""
    main = one_branch.run(weights, config, ids, pixels, tokens)
    if not one_branch.has_image(config, ids):
        return alone(main)

    def edit(layer, w):
        everything = np.ones(w.shape[-1], bool)
        return np.stack([shuffled(w[:, row], everything, layer, seed) for row in range(w.shape[1])], axis=1)

    embeddings = llava.embed(weights, config, ids, pixels, edit)
    tower = changed_prompt(weights, config, embeddings, one_branch.image_ids(config, ids), tokens)
    decoder = one_branch.run(weights, config, ids, pixels, tokens, Shuffled(seed))
    combined = (1 + 2 * gamma) * main - gamma * tower - gamma * decoder
    return main, tower, *one_branch.cut(main, combined, beta)
