"""CausalMM in plain NumPy float64, one sample at a time.

Attention is shuffled by an order that layer and seed give: places are sorted by a hash of 32 bits.
"""

import numpy as np

from tests.reference import llava, one_branch
from tests.reference.branch import Branch, cut, has_image, logits

MASK = 0xFFFFFFFF


def hashed(place, layer, seed):
    """A whole number below 2**32 for each place."""
    x = (place * 0x9E3779B1 + (layer + 1) * 0x85EBCA6B + seed * 0xC2B2AE35) & MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def shuffled(row, seen, layer, seed):
    """Weights [H, S] of which the n-th column that is seen gets those of the n-th in the order of the hash."""
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
    main = logits(weights, config, Branch(weights, config).run(ids, pixels, tokens)[:, -1])
    if not has_image(config, ids):
        return main, main, main, np.full_like(main, np.inf)

    def edit(layer, w):
        everything = np.ones(w.shape[-1], bool)
        return np.stack([shuffled(w[:, row], everything, layer, seed) for row in range(w.shape[1])], axis=1)

    is_image = np.asarray(ids) == config["image_token_index"]
    other = Branch(weights, config)
    states = [other.call(llava.embed(weights, config, ids, pixels, edit), is_image)[-1, -1]]
    states += [other.call(llava.embed(weights, config, [t], None), np.zeros(1, bool))[-1, -1] for t in tokens]
    tower = logits(weights, config, np.stack(states))
    decoder = one_branch.run(weights, config, ids, pixels, tokens, Shuffled(seed))
    combined, distance = cut(main, (1 + 2 * gamma) * main - gamma * tower - gamma * decoder, beta)
    return main, tower, combined, distance
