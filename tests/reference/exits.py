"""Methods that read out layers before the last in plain NumPy float64, one sample at a time: DeCo, DoLa, VISTA."""

import types

import numpy as np

from tests.reference import llava
from tests.reference.one_branch import Branch, cut, has_image, log_softmax, run, without_images


def unnormed(weights, hidden):
    """Next-token logits [..., V] of hidden states [..., E] without the final norm."""
    return hidden @ weights.get("lm_head.weight", weights[f"{llava.LANGUAGE}.embed_tokens.weight"]).T


def deco(weights, config, ids, pixels, tokens, exits, alpha=0.6, top_p=0.9, most=20):
    """DeCo (arXiv 2410.11779). Only candidates keep a finite logit.

    Returns main, combined, each [1 + len(tokens), V]; chosen exits; numbers of candidates; how clear the choices were.
    """
    states = Branch(weights, config).run(ids, pixels, tokens)
    main = llava.head(weights, config, states[:, -1])
    rows, chosen, counts, margin = [], [], [], np.inf
    for state, row in zip(states, main, strict=True):
        p = np.exp(log_softmax(row))
        candidates, total = [], 0.0
        for token in sorted(range(len(p)), key=lambda token: -p[token]):
            margin = min(margin, abs(total - top_p))
            if candidates and (total >= top_p and top_p < 1 or len(candidates) == most):
                margin = min(margin, p[candidates[-1]] - p[token])
                break
            candidates.append(token)
            total += p[token]
        early = [llava.head(weights, config, state[i]) for i in exits]
        surest = [max(np.exp(log_softmax(one))[candidates]) for one in early]
        best = int(np.argmax(surest))
        if len(surest) > 1:
            margin = min(margin, sorted(surest)[-1] - sorted(surest)[-2])
        chosen.append(exits[best])
        counts.append(len(candidates))
        kept = np.isin(np.arange(len(row)), candidates)
        rows.append(np.where(kept, row + alpha * surest[best] * early[best], -np.inf))
    return main, np.stack(rows), chosen, counts, margin


def buckets(depth):
    """DoLa's two published ranges of hidden states: even ones below half the depth, and from there on."""
    low = [i for i in range(depth) if i % 2 == 0 and i < depth / 2]
    high = [i for i in range(depth) if i % 2 == 0 and i >= depth / 2]
    return {"low": low, "high": high}


def kullback_leibler(p, q):
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def jensen_shannon(p, q):
    return (kullback_leibler(p, (p + q) / 2) + kullback_leibler(q, (p + q) / 2)) / 2


def dola(weights, config, ids, pixels, tokens, exits, beta=0.1, norm=True):
    """DoLa (arXiv 2309.03883).

    Returns main, combined, distances to the cut, each [1 + len(tokens), V]; chosen exits; how clear the choices were.
    """
    states = Branch(weights, config).run(ids, pixels, tokens)
    main = llava.head(weights, config, states[:, -1])
    final = log_softmax(main)
    rows, chosen, margin = [], [], np.inf
    for state, row in zip(states, final, strict=True):
        early = [llava.head(weights, config, state[i]) if norm else unnormed(weights, state[i]) for i in exits]
        early = [log_softmax(one) for one in early]
        divergences = [jensen_shannon(np.exp(row), np.exp(one)) for one in early]
        best = int(np.argmax(divergences))
        if len(divergences) > 1:
            margin = min(margin, sorted(divergences)[-1] - sorted(divergences)[-2])
        chosen.append(exits[best])
        rows.append(row - early[best])
    return main, *cut(final, np.stack(rows), beta), chosen, margin


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


def vista(weights, config, ids, pixels, tokens, exits, strength=0.17, gamma=0.3, variant="code"):
    """VISTA (arXiv 2502.03628): main (the steered model's own logits) and combined, each [1 + len(tokens), V].

    The vector of a layer is the difference that the images make to its output at the last prompt token. Exits are
    hidden states, 0 the embeddings, and have no final norm in either variant. Without an image nothing changes.
    """
    if not has_image(config, ids):
        main = run(weights, config, ids, pixels, tokens)
        return main, main
    seeing = Branch(weights, config).prompt(ids, pixels)[1:, -1]
    found = seeing - Branch(weights, config).prompt(without_images(config, ids), None)[1:, -1]
    if variant == "code":
        found[0, 0] += 1  # the principal component of a single sample, which is a unit vector
        hooks = {"mlp": lambda call, x, added: steered_code(added, found[call.layer], strength)}
    else:
        hooks = {"residual": lambda call, hidden: steered_paper(hidden, found[call.layer], strength)}
    states = Branch(weights, config, types.SimpleNamespace(**hooks)).run(ids, pixels, tokens)
    main = llava.head(weights, config, states[:, -1])
    early = np.mean([unnormed(weights, states[:, i]) for i in exits], axis=0)
    return main, (1 - gamma) * main + gamma * early
