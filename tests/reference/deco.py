"""DeCo (arXiv 2410.11779) in plain NumPy float64, one sample at a time. Only candidates keep a finite logit."""

import numpy as np

from tests.reference.branch import Branch, log_softmax, logits


def run(weights, config, ids, pixels, tokens, exits, alpha=0.6, top_p=0.9, most=20):
    """main, combined, each [1 + len(tokens), V]; chosen exits; numbers of candidates; how clear the choices were."""
    states = Branch(weights, config).run(ids, pixels, tokens)
    main = logits(weights, config, states[:, -1])
    rows, chosen, counts, margin = [], [], [], np.inf
    for state, row in zip(states, main, strict=True):
        p = np.exp(log_softmax(row[None]))[0]
        candidates, total = [], 0.0
        for token in sorted(range(len(p)), key=lambda token: -p[token]):
            margin = min(margin, abs(total - top_p))
            if candidates and (total >= top_p and top_p < 1 or len(candidates) == most):
                margin = min(margin, p[candidates[-1]] - p[token])
                break
            candidates.append(token)
            total += p[token]
        early = [logits(weights, config, state[i : i + 1])[0] for i in exits]
        surest = [max(np.exp(log_softmax(one[None]))[0][candidates]) for one in early]
        best = int(np.argmax(surest))
        if len(surest) > 1:
            margin = min(margin, sorted(surest)[-1] - sorted(surest)[-2])
        chosen.append(exits[best])
        counts.append(len(candidates))
        kept = np.isin(np.arange(len(row)), candidates)
        rows.append(np.where(kept, row + alpha * surest[best] * early[best], -np.inf))
    return main, np.stack(rows), chosen, counts, margin
