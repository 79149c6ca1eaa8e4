"""M3ID (arXiv 2403.14003) and RITUAL's port of it in plain NumPy float64, one sample at a time.

t counts the tokens generated before: 0 at the prompt. Without an image the method changes nothing. The port takes the
difference of logits for that of log-probabilities: the same but for a number that all tokens of a step share.
"""

import numpy as np

from tests.reference.branch import Branch, cut, has_image, log_softmax, logits, without_images


def combine(main, contrast, t, decay=0.02, alpha_gate=0.9, beta=0.1, variant="paper"):
    """One step of logits [V]: combined, how far a token is from the cut (port), and the largest p from the gate."""
    g = np.exp(-decay * t)
    factor = (1 - g) / g
    if variant == "port":
        return *cut(main, main + factor * (main - contrast), beta), np.inf
    added = factor * (log_softmax(main) - log_softmax(contrast))
    surest = log_softmax(main).max()
    is_open = surest < np.log(alpha_gate)
    return main + is_open * added, np.full_like(main, np.inf), abs(surest - np.log(alpha_gate))


def run(weights, config, ids, pixels, tokens, **settings):
    """main, contrast, combined, distances to the cut, each [1 + len(tokens), V]; and the distance to the gate."""
    main = logits(weights, config, Branch(weights, config).run(ids, pixels, tokens)[:, -1])
    blind = without_images(config, ids)
    contrast = logits(weights, config, Branch(weights, config).run(blind, None, tokens)[:, -1])
    if not has_image(config, ids):
        return main, contrast, main, np.full_like(main, np.inf), np.inf
    steps = [combine(main[t], contrast[t], t, **settings) for t in range(len(main))]
    combined, distances, gates = zip(*steps, strict=True)
    return main, contrast, np.stack(combined), np.stack(distances), min(gates)
