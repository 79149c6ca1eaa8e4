"""CAPL's selective cross-image and truncated attention (arXiv 2603.07048) in plain NumPy float64.

Readings of the text that are open to choice: the norm is that of the embedding which enters the decoder; of equal
norms the earlier token is taken; "code-qwen" hides every image token from another one, whichever their images.
"""

import dataclasses
import fractions
import math

import numpy as np

from tests.reference import llava
from tests.reference.one_branch import softmax_seen


@dataclasses.dataclass
class Capl:
    sigma: float = 0.5
    rho: str = "0.95"  # a decimal number, taken exactly
    mode: str = "cross"  # | "truncated"
    variant: str = "paper"  # | "code-qwen"
    layers: tuple = None  # explicit ones
    tile: int = None  # tokens of a tile, where the share is taken in each
    margin: float = np.inf  # distance between the last token selected and the first left out
    chosen: list = None

    def begin(self, call, embeddings):
        if not call.prefill:
            return
        norms = np.linalg.norm(embeddings, axis=-1)
        self.chosen = []
        size = self.tile or len(call.rows)
        for tokens in (own[at : at + size] for own in call.images() for at in range(0, len(own), size)):
            keep = max(1, math.floor(fractions.Fraction(self.rho) * len(tokens)))
            order = sorted(tokens, key=lambda j: (-norms[j], j))
            self.chosen += order[:keep]
            if keep < len(tokens):
                self.margin = min(self.margin, norms[order[keep - 1]] - norms[order[keep]])

    def weights(self, call, z):
        w = softmax_seen(call, z)
        default = call.layer % 2 == 0 or self.mode == "truncated"
        if not call.prefill or not (default if self.layers is None else call.layer in self.layers):
            return w
        seen = call.seen.copy()
        for i in call.rows:
            for j in call.rows:
                ours, theirs = call.image_id[i], call.image_id[j]
                if self.mode == "cross":
                    if i in self.chosen and j in self.chosen and ours != theirs:
                        seen[i, j] = True
                elif ours and theirs:
                    if i != j and (ours != theirs or self.variant == "code-qwen"):
                        seen[i, j] = False
        other = llava.softmax(np.where(seen, z, -np.inf))
        return other if self.mode == "truncated" else (1 - self.sigma) * w + self.sigma * other
