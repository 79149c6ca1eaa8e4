"""VCD (arXiv 2311.16922) in plain NumPy float64, one sample at a time.

The contrast branch reads pictures diffused for `step` steps: step t is the product of factors 0 ... t. Without an
image the method changes nothing.
"""

import numpy as np

from tests.reference.branch import Branch, cut, has_image, logits


def kept_share(step):
    """The square of the factor on the clean picture."""
    share = 1.0
    for i in range(step + 1):
        x = -6 + 12 * i / 999
        share *= 1 - (1 / (1 + np.exp(-x)) * (0.005 - 1e-5) + 1e-5)
    return share


def run(weights, config, ids, pixels, tokens, noise, alpha=1.0, beta=0.1, step=500):
    """main, contrast, combined, distances to the cut, each [1 + len(tokens), V]; `noise` has the pixels' shape."""
    main = logits(weights, config, Branch(weights, config).run(ids, pixels, tokens)[:, -1])
    if not has_image(config, ids):
        return main, main, main, np.full_like(main, np.inf)
    share = kept_share(step)
    noisy = np.sqrt(share) * pixels + np.sqrt(1 - share) * noise
    contrast = logits(weights, config, Branch(weights, config).run(ids, noisy, tokens)[:, -1])
    combined, distance = cut(main, main + alpha * (main - contrast), beta)
    return main, contrast, combined, distance
