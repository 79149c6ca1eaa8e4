"""ICD (arXiv 2403.18715) in plain NumPy float64, one sample at a time.

The contrast branch reads `words` before the prompt (after its BOS token, if `bos` is given and the prompt opens with
it), pictures included. Without an image the method changes nothing.
"""

import numpy as np

from tests.reference.branch import Branch, cut, has_image, logits


def run(weights, config, ids, pixels, tokens, words, bos=None, alpha=1.0, beta=0.1):
    """main, contrast, combined, distances to the cut, each [1 + len(tokens), V]."""
    main = logits(weights, config, Branch(weights, config).run(ids, pixels, tokens)[:, -1])
    at = 1 if bos is not None and ids[0] == bos else 0
    disturbed = [*ids[:at], *words, *ids[at:]]
    contrast = logits(weights, config, Branch(weights, config).run(disturbed, pixels, tokens)[:, -1])
    if not has_image(config, ids):
        return main, contrast, main, np.full_like(main, np.inf)
    combined, distance = cut(main, main + alpha * (main - contrast), beta)
    return main, contrast, combined, distance
