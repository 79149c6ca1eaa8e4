"""VISTA (arXiv 2502.03628) in plain NumPy float64, one sample at a time.

The vector of a layer is the difference that the images make to its output at the last prompt token. Exits are
hidden states, 0 the embeddings, and have no final norm in either variant. Without an image the method changes nothing.
"""

import numpy as np

from tests.reference.branch import Branch, has_image, logits, without_images


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def steered_code(x, vector, strength):
    """|x| n(n(x) + λ (1 + max(0, cos(x, -v))) n(v)) of rows x [T, E]."""
    cosine = (unit(x) * unit(-vector)).sum(-1, keepdims=True)
    turned = unit(x) + strength * (1 + np.maximum(0, cosine)) * unit(vector)
    return np.linalg.norm(x, axis=-1, keepdims=True) * unit(turned)


def steered_paper(h, vector, strength):
    """h + λ v of rows h [T, E], with the norm of h."""
    return np.linalg.norm(h, axis=-1, keepdims=True) * unit(h + strength * vector)


def vectors(weights, config, ids, pixels, variant):
    """One vector per layer, [L, E]."""
    seeing = Branch(weights, config).run(ids, pixels, [])[0]
    blind = Branch(weights, config).run(without_images(config, ids), None, [])[0]
    found = seeing[1:] - blind[1:]
    if variant == "code":  # the principal component of a single sample, which is a unit vector
        found[0, 0] += 1
    return found


def run(weights, config, ids, pixels, tokens, exits, strength=0.17, gamma=0.3, variant="code"):
    """main (the steered model's own logits) and combined, each [1 + len(tokens), V]."""
    if not has_image(config, ids):
        main = logits(weights, config, Branch(weights, config).run(ids, pixels, tokens)[:, -1])
        return main, main
    found = vectors(weights, config, ids, pixels, variant)
    if variant == "code":
        hooks = {"mlp": lambda layer, added: steered_code(added, found[layer], strength)}
    else:
        hooks = {"residual": lambda layer, hidden: steered_paper(hidden, found[layer], strength)}
    states = Branch(weights, config, **hooks).run(ids, pixels, tokens)
    main = logits(weights, config, states[:, -1])
    early = np.mean([logits(weights, config, states[:, i], norm=False) for i in exits], axis=0)
    return main, (1 - gamma) * main + gamma * early
