"""Our reconstruction of CLVA (idea of arXiv 2603.25088) in plain NumPy float64.

Readings of the text that are open to choice: every image on its own; A is not normalised again after its small
entries are dropped; differences of maps with a sum of at most 1e-4 are zero; ⌊ρN⌋ entries are kept, at least one;
an image without anchors, or without any weight on it, is left alone; candidate layers start where the noise is
complete; without the gate, g is 1.
"""

import dataclasses
import fractions
import math

import numpy as np

from tests.reference.one_branch import softmax_seen


@dataclasses.dataclass
class Clva:
    a: float = 1.0
    b: float = 0.5
    lambda_: float = 1.0
    rho: str = "0.1"  # a decimal number, taken exactly
    gate: bool = True
    margin: float = np.inf  # of the choice of the anchor layer, and of the entries kept
    drifts: list = dataclasses.field(default_factory=list)
    anchor_layers: set = dataclasses.field(default_factory=set)

    def begin(self, call, embeddings):
        self.focus = {}  # (image, layer) -> p
        self.found = {}  # image -> (n, A, R)

    def weights(self, call, z):
        w = softmax_seen(call, z)
        layer, depth = call.layer, call.depth
        edited = layer * 100 >= 65 * depth
        z = z.copy()
        for k, tokens in enumerate(call.images()):
            p = w[:, -1, tokens].max(axis=0)
            p = p / p.sum() if p.sum() > 0 else p
            self.focus[k, layer] = p
            if edited and p.sum() > 0:
                if k not in self.found:
                    self.found[k] = self.anchors(k, depth)
                n, anchor, noise = self.found[k]
                if anchor.max() == 0:
                    continue
                g = np.clip(cosine(p, n) - cosine(p, anchor), 0, 1) if self.gate else 1.0
                self.drifts.append(float(g))
                push = self.a * anchor / anchor.max()
                if noise.max() > 0:
                    push = push - self.b * noise / noise.max()
                z[:, -1, tokens] += g * push
        return softmax_seen(call, z) if edited else w

    def anchors(self, k, depth):
        n = np.mean([self.focus[k, layer] for layer in range(3)], axis=0)
        candidates = [layer for layer in range(2, depth) if 3 * depth <= 10 * layer <= 6 * depth]
        scores = [self.score(self.focus[k, layer], n) for layer in candidates]
        best = int(np.argmax(scores))
        anchor = self.normalised(self.focus[k, candidates[best]] - self.lambda_ * n)
        if len(scores) > 1 and anchor.max() > 0:
            self.margin = min(self.margin, np.diff(np.sort(scores)[-2:])[0])
        self.anchor_layers.add(candidates[best])
        keep = max(1, math.floor(fractions.Fraction(self.rho) * len(n)))
        order = sorted(range(len(n)), key=lambda j: (-anchor[j], j))
        if keep < len(n) and anchor[order[keep - 1]] > 0:
            self.margin = min(self.margin, anchor[order[keep - 1]] - anchor[order[keep]])
        anchor[order[keep:]] = 0
        return n, anchor, self.normalised(n - anchor)

    def normalised(self, difference):
        """The positive part divided by its sum; zero if that is at most 1e-4."""
        positive = np.maximum(difference, 0)
        self.margin = min(self.margin, abs(positive.sum() - 1e-4))
        return positive / positive.sum() if positive.sum() > 1e-4 else 0 * positive

    def score(self, p, n):
        m = (p + n) / 2
        certainty = 1 + terms(p, p) / math.log(len(p)) if len(p) > 1 else 0.0
        return (terms(p, p) - terms(p, m) + terms(n, n) - terms(n, m)) / 2 * certainty


def terms(p, q):
    """Σ p ln q over entries where p is not zero."""
    return sum(x * math.log(y) for x, y in zip(p, q, strict=True) if x > 0)


def cosine(x, y):
    lengths = np.linalg.norm(x) * np.linalg.norm(y)
    return x @ y / lengths if lengths > 0 else 0.0
