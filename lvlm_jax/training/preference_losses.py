"""Losses of preference learning, from the log-probabilities of answer tokens under policy and reference.

With Δ(y) = log π(y) - log π_ref(y) summed over the tokens of an answer, and h = Δ(y_w) - Δ(y_l):

    sigmoid  -(1 - ε) log σ(β h) - ε log σ(-β h)   DPO, arXiv 2305.18290; ε > 0: conservative DPO
    ipo      (h - 1 / (2 β))², Δ here the mean over the answer's tokens   arXiv 2310.12036, as TRL computes it
    hinge    max(0, 1 - β h)   SLiC, arXiv 2305.10425

CAPL (arXiv 2603.07048) adds λ NLL(y_w), the mean over the chosen answer's tokens. y_w is chosen, y_l rejected.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lvlm_jax.training.losses import Mean

LOSSES = ("sigmoid", "ipo", "hinge")


def pair_losses(margin: Float[Array, "B"], loss: str, beta: float, label_smoothing: float = 0.0) -> Float[Array, "B"]:
    """The loss of each pair from its margin h, without the likelihood term."""
    if loss == "ipo":
        return jnp.square(margin - 1 / (2 * beta))
    if loss == "hinge":
        return jax.nn.relu(1 - beta * margin)
    kept, flipped = jax.nn.log_sigmoid(beta * margin), jax.nn.log_sigmoid(-beta * margin)
    return -(1 - label_smoothing) * kept - label_smoothing * flipped


def per_pair(values: Float[Array, "B"], weight: Float[Array, "B"]) -> Mean:
    """The mean over pairs, each with its weight."""
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
    """Everything that is learned from or watched in B pairs of answers of at most A tokens.

    Args:
        policy, reference: log-probabilities of the answer tokens; chosen first, then rejected.
        mask: which of the A places hold a token.
        weight: of each pair; 0 leaves it out.
        loss: one of LOSSES.

    Returns:
        Per pair: `preference` (the loss), `nll` (of the chosen answer, nats per token), `rewards/chosen`,
        `rewards/rejected` (β Δ), `rewards/margin` (β h), `rewards/accuracy` (h > 0), `logps/chosen`,
        `logps/rejected` (log π of the whole answer). Per token: `kl`, an estimate of KL(π_ref ‖ π) that is unbiased
        where the answers are the reference's own samples, and never negative.
    """
    policy, reference = jnp.where(mask, policy, 0.0), jnp.where(mask, reference, 0.0)
    tokens = mask.sum(axis=-1, dtype=jnp.float32)
    ratio = policy - reference
    delta = ratio.sum(axis=-1)
    if loss == "ipo":
        delta = delta / jnp.maximum(tokens, 1)
    margin = delta[:, 0] - delta[:, 1]
    logps = policy.sum(axis=-1)

    # With r = π / π_ref on a token of the reference, r - 1 - log r has the mean KL(π_ref ‖ π).
    drift = (jnp.expm1(ratio) - ratio) * weight[:, None, None]
    return {
        "preference": per_pair(pair_losses(margin, loss, beta, label_smoothing), weight),
        "nll": per_pair(-logps[:, 0] / jnp.maximum(tokens[:, 0], 1), weight),
        "rewards/chosen": per_pair(beta * delta[:, 0], weight),
        "rewards/rejected": per_pair(beta * delta[:, 1], weight),
        "rewards/margin": per_pair(beta * margin, weight),
        "rewards/accuracy": per_pair((margin > 0).astype(jnp.float32), weight),
        "logps/chosen": per_pair(logps[:, 0], weight),
        "logps/rejected": per_pair(logps[:, 1], weight),
        "kl": Mean(drift.sum(), jnp.sum(tokens * weight[:, None])),
    }
