"""DoLa (arXiv 2309.03883) in plain NumPy float64, one sample at a time."""

import numpy as np

from tests.reference.branch import Branch, cut, log_softmax, logits


def buckets(depth):
    """The hidden states of the two published ranges: even ones below half the depth, and from there on."""
    low = [i for i in range(depth) if i % 2 == 0 and i < depth / 2]
    high = [i for i in range(depth) if i % 2 == 0 and i >= depth / 2]
    return {"low": low, "high": high}


def kullback_leibler(p, q):
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def jensen_shannon(p, q):
    return (kullback_leibler(p, (p + q) / 2) + kullback_leibler(q, (p + q) / 2)) / 2


def run(weights, config, ids, pixels, tokens, exits, beta=0.1, norm=True):
    """main, combined, distances to the cut, each [1 + len(tokens), V]; chosen exits; how clear the choices were."""
    states = Branch(weights, config).run(ids, pixels, tokens)
    main = logits(weights, config, states[:, -1])
    final = log_softmax(main)
    rows, chosen, margin = [], [], np.inf
    for state, row in zip(states, final, strict=True):
        early = [log_softmax(logits(weights, config, state[i : i + 1], norm))[0] for i in exits]
        divergences = [jensen_shannon(np.exp(row), np.exp(one)) for one in early]
        best = int(np.argmax(divergences))
        ordered = sorted(divergences)
        if len(ordered) > 1:
            margin = min(margin, ordered[-1] - ordered[-2])
        chosen.append(exits[best])
        rows.append(row - early[best])
    combined, distance = cut(final, np.stack(rows), beta)
    return main, combined, distance, chosen, margin
