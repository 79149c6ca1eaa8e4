"""M3ID (arXiv 2403.14003) in plain NumPy float64, one sample at a time.

t counts the tokens generated before: 0 at the prompt. Without an image the method changes nothing.
"""

import numpy as np

from tests.reference.branch import Branch, cut, has_image, logits, without_images


def run(weights, config, ids, pixels, tokens, decay=0.02, beta=0.1):
    """main, contrast, combined, distances to the cut, each [1 + len(tokens), V]."""
    main = logits(weights, config, Branch(weights, config).run(ids, pixels, tokens)[:, -1])
    blind = without_images(config, ids)
    contrast = logits(weights, config, Branch(weights, config).run(blind, None, tokens)[:, -1])
    if not has_image(config, ids):
        return main, contrast, main, np.full_like(main, np.inf)
    gate = np.exp(-decay * np.arange(len(main)))[:, None]
    combined, distance = cut(main, main + (1 - gate) / gate * (main - contrast), beta)
    return main, contrast, combined, distance
