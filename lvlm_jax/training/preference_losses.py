"""Losses of preference learning, from the log-probabilities of answer tokens under policy and reference.

With Δ(y) = log π(y) - log π_ref(y) summed over the tokens of an answer, |y| their number, y_w the chosen and y_l the
rejected answer, h = Δ(y_w) - Δ(y_l), ε the share of pairs whose order is wrong, σ the logistic function:

    sigmoid       -(1 - ε) log σ(β h) - ε log σ(-β h)   DPO, arXiv 2305.18290; conservative DPO if ε > 0
    sigmoid_norm  -log σ(β (Δ(y_w)/|y_w| - Δ(y_l)/|y_l|))   DPO with log-ratios per token
    robust        [-(1 - ε) log σ(β h) + ε log σ(-β h)] / (1 - 2 ε)   arXiv 2403.00409
    ipo           (Δ(y_w)/|y_w| - Δ(y_l)/|y_l| - 1 / (2 β))²   arXiv 2310.12036, per token as TRL has it
    hinge         max(0, 1 - β h)   SLiC, arXiv 2305.10425
    exo_pair      KL((σ(β h), σ(-β h)) ‖ (1 - ε, ε))   arXiv 2402.00856, ε > 0
    bco_pair      -log σ(β Δ(y_w)) - log σ(-β Δ(y_l))   arXiv 2404.04656, without its moving shift, as TRL has it
    nca_pair      -log σ(β Δ(y_w)) - ½ log σ(-β Δ(y_w)) - ½ log σ(-β Δ(y_l))   arXiv 2402.05369
    sppo_hard     (Δ(y_w) - 1 / (2 β))² + (Δ(y_l) + 1 / (2 β))²   arXiv 2405.00675
    apo_zero      1 - σ(β Δ(y_w)) + σ(β Δ(y_l))   arXiv 2408.06266
    apo_down      σ(β Δ(y_w)) + 1 - σ(β h)   arXiv 2408.06266
    sft           -log π(y_w), the mean over all chosen tokens of a batch   as in TRL; CAPL's term is `nll`

Their values are those of TRL's `DPOTrainer` for `loss_type`. Several of them add up with weights, as in InternVL's MPO
(arXiv 2411.10442): "0.8*sigmoid + 0.2*bco_pair + sft".

CAPL (arXiv 2603.07048) adds λ NLL(y_w), a mean over the tokens of each chosen answer and then over pairs (`nll`).
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lvlm_jax.errors import LVLMError
from lvlm_jax.training.losses import Mean

SFT = "sft"


class Ratios(NamedTuple):
    """The quantities that the loss of a pair depends on.

    Attributes:
        chosen, rejected: Δ of the two answers in nats, one per pair.
        tokens: number of tokens of each answer; at least 1.
    """

    chosen: Float[Array, "B"]
    rejected: Float[Array, "B"]
    tokens: Float[Array, "B 2"]

    @property
    def margin(self) -> Float[Array, "B"]:
        """The margin h = Δ(y_w) - Δ(y_l) of each pair, in nats."""
        return self.chosen - self.rejected

    @property
    def margin_per_token(self) -> Float[Array, "B"]:
        """The margin per token, Δ(y_w)/|y_w| - Δ(y_l)/|y_l|, in nats."""
        return self.chosen / self.tokens[:, 0] - self.rejected / self.tokens[:, 1]


PairLoss = Callable[[Ratios, float, float], Float[Array, "B"]]  # (ratios, β, ε) -> the loss of each pair


def preferred(margin: Float[Array, "B"], smoothing: float = 0.0) -> Float[Array, "B"]:
    """The loss -(1 - ε) log σ(margin) - ε log σ(-margin); ε is the share of wrong labels."""
    return -(1 - smoothing) * jax.nn.log_sigmoid(margin) - smoothing * jax.nn.log_sigmoid(-margin)


def _robust(ratios: Ratios, beta: float, smoothing: float) -> Float[Array, "B"]:
    log_kept, log_flipped = (jax.nn.log_sigmoid(sign * beta * ratios.margin) for sign in (1, -1))
    return (smoothing * log_flipped - (1 - smoothing) * log_kept) / (1 - 2 * smoothing)


def _exo(ratios: Ratios, beta: float, smoothing: float) -> Float[Array, "B"]:
    logits = jnp.stack([beta * ratios.margin, -beta * ratios.margin])
    target = jnp.log(jnp.array([1 - smoothing, smoothing]))[:, None]
    return jnp.sum(jax.nn.sigmoid(logits) * (jax.nn.log_sigmoid(logits) - target), axis=0)


def _nca(ratios: Ratios, beta: float, _: float) -> Float[Array, "B"]:
    chosen, rejected = beta * ratios.chosen, beta * ratios.rejected
    down = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - down / 2


PAIR_LOSSES: Mapping[str, PairLoss] = {
    "sigmoid": lambda ratios, beta, smoothing: preferred(beta * ratios.margin, smoothing),
    "sigmoid_norm": lambda ratios, beta, _: preferred(beta * ratios.margin_per_token),
    "robust": _robust,
    "ipo": lambda ratios, beta, _: jnp.square(ratios.margin_per_token - 1 / (2 * beta)),
    "hinge": lambda ratios, beta, _: jax.nn.relu(1 - beta * ratios.margin),
    "exo_pair": _exo,
    "bco_pair": lambda ratios, beta, _: preferred(beta * ratios.chosen) + preferred(-beta * ratios.rejected),
    "nca_pair": _nca,
    "sppo_hard": lambda ratios, beta, _: (
        jnp.square(ratios.chosen - 0.5 / beta) + jnp.square(ratios.rejected + 0.5 / beta)
    ),
    "apo_zero": lambda ratios, beta, _: (
        1 - jax.nn.sigmoid(beta * ratios.chosen) + jax.nn.sigmoid(beta * ratios.rejected)
    ),
    "apo_down": lambda ratios, beta, _: jax.nn.sigmoid(beta * ratios.chosen) + 1 - jax.nn.sigmoid(beta * ratios.margin),
}
LOSSES = (*PAIR_LOSSES, SFT)
SMOOTHED = ("sigmoid", "robust", "exo_pair")  # losses that depend on ε


def mixture(words: str) -> dict[str, float]:
    """Parses an expression into losses with weights: {"sigmoid": 0.8, "sft": 1.0} for "0.8*sigmoid + sft".

    Raises:
        LVLMError: an unknown loss, a repeated one, or a weight that is not a finite number above 0.
    """
    weights: dict[str, float] = {}
    for term in words.split("+"):
        weight, _, name = (part.strip() for part in term.rpartition("*"))
        if name not in LOSSES:
            raise LVLMError(
                f"the loss {words[:80]!r} names {name[:40]!r}; expected {', '.join(LOSSES)}, or several with weights "
                "such as '0.8*sigmoid + 0.2*bco_pair + sft'"
            )
        try:
            value = float(weight or 1)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise LVLMError(f"the loss {words[:80]!r} has the weight {weight[:40]!r}; expected a number above 0")
        if name in weights:
            raise LVLMError(f"the loss {words[:80]!r} names {name} twice; give it one weight")
        weights[name] = value
    return weights


def per_pair(values: Float[Array, "B"], weight: Float[Array, "B"]) -> Mean:
    """The mean of `values` over pairs, weighted by `weight`."""
    return Mean(jnp.sum(values * weight), jnp.sum(weight))


def metrics(
    policy: Float[Array, "B 2 A"],
    reference: Float[Array, "B 2 A"],
    mask: Bool[Array, "B 2 A"],
    weight: Float[Array, "B"],
    loss: str,
    beta: float,
    label_smoothing: float = 0.0,
) -> dict[str, Mean]:
    """All training and monitoring metrics of B pairs of answers of at most A tokens.

    Args:
        policy, reference: log-probabilities of the answer tokens; chosen first, then rejected.
        mask: which of the A positions have a token.
        weight: weight of each pair; 0 leaves it out.
        loss: one of LOSSES, or several as `mixture` takes them.
        label_smoothing: ε.

    Returns:
        Per pair: `preference` (the weighted sum of the pair losses of `loss`), `nll` (of the chosen answer, nats per
        token), `rewards/chosen`, `rewards/rejected` (β Δ), `rewards/margin` (β h), `rewards/accuracy` (h > 0, a tie
        counts half), `logps/chosen`, `logps/rejected` (log π of the whole answer). Per token: `sft` (-log π of the
        chosen tokens), and `drift`, the mean of r - 1 - log r with r = π / π_ref: 0 at the start and never negative.
        It estimates KL(π_ref ‖ π) if the answers are sampled from the reference.
    """
    policy, reference = jnp.where(mask, policy, 0.0), jnp.where(mask, reference, 0.0)
    tokens = mask.sum(axis=-1, dtype=jnp.float32)
    ratio = policy - reference
    delta, logps = ratio.sum(axis=-1), policy.sum(axis=-1)
    ratios = Ratios(delta[:, 0], delta[:, 1], jnp.maximum(tokens, 1))
    losses = {
        name: share * PAIR_LOSSES[name](ratios, beta, label_smoothing)
        for name, share in mixture(loss).items()
        if name != SFT
    }

    drift = (jnp.expm1(ratio) - ratio) * weight[:, None, None]
    return {
        "preference": per_pair(sum(losses.values(), jnp.zeros_like(weight)), weight),
        "nll": per_pair(-logps[:, 0] / ratios.tokens[:, 0], weight),
        "sft": Mean(-jnp.sum(logps[:, 0] * weight), jnp.sum(tokens[:, 0] * weight)),
        "rewards/chosen": per_pair(beta * ratios.chosen, weight),
        "rewards/rejected": per_pair(beta * ratios.rejected, weight),
        "rewards/margin": per_pair(beta * ratios.margin, weight),
        "rewards/accuracy": per_pair((1 + jnp.sign(ratios.margin)) / 2, weight),
        "logps/chosen": per_pair(logps[:, 0], weight),
        "logps/rejected": per_pair(logps[:, 1], weight),
        "drift": Mean(drift.sum(), jnp.sum(tokens * weight[:, None])),
    }
