"""EAH (arXiv 2411.09968) in plain NumPy float64.

Readings of the text that are open to choice: with several images every image is judged by its own rows (paper), S₀
and E (code) enclose all of them, and a head's sinks are counted over all of them; a later row that cannot see a column
(sliding window) is not counted for it; a column without later rows is no sink.
"""

import dataclasses

import numpy as np

from tests.reference.one_branch import softmax_seen


@dataclasses.dataclass
class Eah:
    beta: float
    layer: int
    variant: str = "paper"
    margin: float = np.inf  # smallest |c − beta|
    sinks: list = None  # per head
    applied: bool = False

    def received(self, call, w, tokens, j):
        """c[j] of every head, for a column of the image with columns `tokens`."""
        if self.variant == "code":
            images = np.flatnonzero(call.image_id > 0)
            first, end = images[0], images[-1] + 1
            return sum(w[:, x, j] for x in call.rows[j + 1 :]) / (first + end - j) if j + 1 < len(call.rows) else 0
        later = [x for x in tokens if x > j and call.seen[x, j]]
        return sum(w[:, x, j] for x in later) / len(later) if later else None

    def weights(self, call, z):
        w = softmax_seen(call, z)
        if call.layer != self.layer or not call.prefill:
            return w
        sinks = np.zeros(len(w), int)
        for tokens in call.images():
            for j in tokens:
                c = self.received(call, w, tokens, j)
                if c is None:
                    continue
                self.margin = min(self.margin, np.abs(c - self.beta).min())
                sinks += c > self.beta
        self.sinks = list(sinks)
        best = self.sinks.index(max(self.sinks))
        self.applied = max(self.sinks) > 0 and not (self.variant == "code" and best == 0)
        return np.stack([w[best]] * len(w)) if self.applied else w
