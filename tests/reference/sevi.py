"""SEVI (arXiv 2505.14257) and its contrast with another picture (CICD) in plain NumPy float64.

Readings of the text that are open to choice: with several images the text after the last one is 𝒮 and the text
between images belongs to the rest; CICD cuts implausible tokens at steps without contrast as well, but leaves
samples without an image alone. In the authors' Qwen2-VL files ("code-qwen") the rest is the tokens of the images alone,
and CICD contrasts where the divergence, computed as in their other code, is above 0.1.
"""

import dataclasses

import numpy as np

from tests.reference.one_branch import softmax_seen


@dataclasses.dataclass
class Sevi:
    omega: float = 4.0
    kappa: float = 0.2
    start_layer: int = 4
    variant: str = "paper"
    margin: float = np.inf  # the closest that a head came to another class
    stages: set = dataclasses.field(default_factory=set)  # what has happened: "text", "global"

    def weights(self, call, z):
        w = softmax_seen(call, z)
        ends = np.flatnonzero(call.image_id > 0)
        if call.layer < self.start_layer or len(ends) == 0:
            return w
        columns = np.flatnonzero(call.seen[-1])
        after = [j for j in columns if j > ends[-1]]
        rest = [j for j in columns if j <= ends[-1]]
        if self.variant == "code-qwen":
            rest = [j for j in rest if call.image_id[j] > 0]
        row = z[:, -1]
        core, spread, others = [], [], []
        for h in range(len(z)):
            on_text, on_rest = w[h, -1, after].sum(), w[h, -1, rest].sum()
            self.margin = min(self.margin, abs(on_text - on_rest))
            if on_text < on_rest:
                others.append(h)
                continue
            peak = w[h, -1, after].max()
            self.margin = min(self.margin, abs(peak - self.kappa * on_text))
            (core if peak > self.kappa * on_text else spread).append(h)
        new = row.copy()
        if others and spread:
            self.stages.add("text")
            for h in others:
                new[h] = (row[h] + self.omega * row[spread].mean(0)) / (1 + self.omega)
        if core and spread:
            self.stages.add("global")
            for h in spread:
                new[h] = (row[h] + self.omega * row[core].max(0)) / (1 + self.omega)
        z = z.copy()
        z[:, -1] = new
        return softmax_seen(call, z)


def kl(p, q):
    return float(np.sum(p * (np.log(p) - np.log(q))))


def divergence(main, contrast, variant):
    """JSD in nats of the softmaxes of two rows of logits [V]."""
    p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (main, contrast))
    m = (p + q) / 2
    return (kl(p, m) + kl(q, m)) / 2 if variant == "paper" else (kl(m, p) + kl(m, q)) / 2


def combine(main, contrast, variant, beta=0.1, alpha_max=3.0):
    """(combined [V], alpha, J) of one step."""
    j = min(1.0, divergence(main, contrast, variant))
    least = 0.1 if variant == "code-qwen" else 1e-4
    alpha = min(alpha_max, 1 - np.log10(j)) if j > least else 0.0
    contrasted = (1 + alpha) * main - alpha * contrast
    return np.where(main < main.max() + np.log(beta), -np.inf, contrasted), alpha, j
