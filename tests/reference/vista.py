"""VISTA (arXiv 2502.03628) in plain NumPy float64, one sample at a time.

The steering vector of a layer is the difference it makes at the last prompt token to have the images. Without an
image the method changes nothing.
"""

import numpy as np

from tests.reference.branch import Branch, has_image, logits, without_images


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def run(weights, config, ids, pixels, tokens, exits, strength=0.17, gamma=0.3, mixing="add"):
    """main (the steered model's own logits) and combined, each [1 + len(tokens), V]."""
    if not has_image(config, ids):
        main = logits(weights, config, Branch(weights, config).run(ids, pixels, tokens)[:, -1])
        return main, main
    seeing = Branch(weights, config).run(ids, pixels, [])[0]
    blind = Branch(weights, config).run(without_images(config, ids), None, [])[0]

    def steer(layer, hidden):
        vector = seeing[layer + 1] - blind[layer + 1]
        length = np.linalg.norm(hidden, axis=-1, keepdims=True)
        return length * unit(unit(hidden) + strength * unit(vector))

    states = Branch(weights, config, residual=steer).run(ids, pixels, tokens)
    main = logits(weights, config, states[:, -1])
    early = np.mean([logits(weights, config, states[:, i]) for i in exits], axis=0)
    return main, (main if mixing == "add" else (1 - gamma) * main) + gamma * early
