"""Preference losses in plain NumPy float64, one pair at a time, from next-token logits.

Readings of the text that are open to choice: the stop token belongs to an answer; IPO's log-ratios are means over the
answer's tokens (as TRL takes them); λ weighs the chosen answer's mean negative log-probability per token.
"""

import dataclasses
import math

import numpy as np

from tests.reference import llava, one_branch


def token_logprobs(logits, ids, start):
    """log p(ids[t] | ids[:t]) for t >= start, from `logits` [T, V] of one sequence."""
    found = []
    for t in range(start, len(ids)):
        row = logits[t - 1]
        top = row.max()
        found.append(row[ids[t]] - top - math.log(np.exp(row - top).sum()))
    return np.array(found)


@dataclasses.dataclass
class Losses:
    """All quantities of one pair; arguments are token log-probabilities of the answers."""

    loss: str = "sigmoid"
    beta: float = 0.1
    smoothing: float = 0.0
    nll: float = 0.0

    def pair(self, chosen, rejected, reference_chosen, reference_rejected):
        """Loss, its parts and the rewards, by the names of the metrics."""
        ratios = [np.sum(p - r) for p, r in ((chosen, reference_chosen), (rejected, reference_rejected))]
        h = ratios[0] - ratios[1]
        if self.loss == "sigmoid":
            right = 1 / (1 + math.exp(-self.beta * h))
            value = -(1 - self.smoothing) * math.log(right) - self.smoothing * math.log(1 - right)
        elif self.loss == "ipo":
            value = (ratios[0] / len(chosen) - ratios[1] / len(rejected) - 1 / (2 * self.beta)) ** 2
        else:
            value = max(0.0, 1 - self.beta * h)
        likelihood = -np.mean(chosen)
        return {
            "objective": value + self.nll * likelihood,
            "preference": value,
            "nll": likelihood,
            "rewards/chosen": self.beta * ratios[0],
            "rewards/rejected": self.beta * ratios[1],
            "rewards/margin": self.beta * h,
            "rewards/accuracy": (1 + np.sign(h)) / 2,
            "logps/chosen": np.sum(chosen),
            "logps/rejected": np.sum(rejected),
        }

    def mean(self, pairs):
        """The means over pairs, each the arguments of `pair`; and the divergence, over all tokens."""
        every = [self.pair(*pair) for pair in pairs]
        means = {name: np.mean([one[name] for one in every]) for name in every[0]}
        drift = [p - r for c, j, rc, rj in pairs for p, r in ((c, rc), (j, rj))]
        log_ratio = np.concatenate(drift)
        tokens = np.concatenate([chosen for chosen, *_ in pairs])
        return means | {"drift": np.mean(np.exp(log_ratio) - 1 - log_ratio), "sft": -np.mean(tokens)}


def sequence_logits(weights, config, ids, pixels, method=None):
    """Next-token logits [T, V] of one whole sequence, under the attention of a method of `one_branch`."""
    return llava.head(weights, config, one_branch.Branch(weights, config, method).prompt(ids, pixels)[-1])
