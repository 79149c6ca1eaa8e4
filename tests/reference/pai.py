"""PAI (arXiv 2407.21771) in plain NumPy float64, one sample at a time.

The last row of every call gains alpha |z| on image columns, in all heads of the layers from 2 on. The other branch
has neither images nor the edit. Without an image the method changes nothing.
"""

import numpy as np

from tests.reference.branch import Branch, cut, has_image, log_softmax, logits, without_images


def run(weights, config, ids, pixels, tokens, alpha=0.2, gamma=1.1, beta=0.1, first_layer=2, layers=None):
    """main, contrast, combined, distances to the cut, each [1 + len(tokens), V]; main is the edited branch."""

    def amplify(layer, z, is_image):
        if layer in layers if layers is not None else layer >= first_layer:
            z = z.copy()
            for column in np.flatnonzero(is_image):
                score = z[:, -1, column]
                z[:, -1, column] = np.where(np.isneginf(score), score, score + alpha * np.abs(score))
        return z

    main = logits(weights, config, Branch(weights, config, amplify).run(ids, pixels, tokens)[:, -1])
    blind = without_images(config, ids)
    contrast = logits(weights, config, Branch(weights, config).run(blind, None, tokens)[:, -1])
    if not has_image(config, ids):
        return main, contrast, main, np.full_like(main, np.inf)
    s, u = log_softmax(main), log_softmax(contrast)
    combined, distance = cut(s, gamma * (s - u) + u, beta)
    return main, contrast, combined, distance
