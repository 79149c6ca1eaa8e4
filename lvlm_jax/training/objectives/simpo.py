"""SimPO (arXiv 2405.14734): preference learning without a reference model.

    L = -(1 - ε) log σ(h) - ε log σ(-h),   h = β/|y_w| log π(y_w) - β/|y_l| log π(y_l) - γ

y_w is the chosen answer, y_l the rejected one, |y| the number of tokens of an answer, its stop token included, and ε
the share of pairs whose order is wrong. β 2 and γ 0.5 are the defaults of the authors' code; in the paper they used
β 2 or 2.5 and γ/β from 0.1 to 0.8. TRL's CPOTrainer computes the same with `loss_type="simpo"` and `cpo_alpha=0`.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from lvlm_jax.lvlm import LVLM
from lvlm_jax.training import loop
from lvlm_jax.training.data.pair_batches import Batch
from lvlm_jax.training.losses import Mean
from lvlm_jax.training.pairwise import Scorer
from lvlm_jax.training.preference_losses import per_pair, preferred
from lvlm_jax.training.registry import Check, Objective
from lvlm_jax.training.samples import Samples
from lvlm_jax.weights import parts


def losses(
    policy: Float[Array, "B 2 A"],
    mask: Bool[Array, "B 2 A"],
    weight: Float[Array, "B"],
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
) -> dict[str, Mean]:
    """Losses and metrics of B pairs of answers of at most A tokens.

    Args:
        policy: log-probabilities of the answer tokens in nats; chosen first, then rejected.
        mask: which of the A places have a token.
        weight: weight of each pair; 0 leaves it out.

    Returns:
        Per pair: `preference` (the loss), `rewards/chosen`, `rewards/rejected` (β/|y| log π(y)), `rewards/margin`
            (their difference), `rewards/accuracy` (whether it is above 0), `logps/chosen`, `logps/rejected` (log π of
            the whole answer).
    """
    logps = jnp.where(mask, policy, 0.0).sum(axis=-1)
    rewards = beta * logps / jnp.maximum(mask.sum(axis=-1, dtype=jnp.float32), 1)
    margin = rewards[:, 0] - rewards[:, 1]
    result = {
        "preference": preferred(margin - gamma, label_smoothing),
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margin": margin,
        "rewards/accuracy": (margin > 0).astype(jnp.float32),
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, 1],
    }
    return {name: per_pair(values, weight) for name, values in result.items()}


def metrics(
    scorer: Scorer, settings: Mapping[str, float], trainable: Any, frozen: Any, batch: Batch, key: jax.Array | None
) -> dict[str, Mean]:
    """The loss and metrics of a batch, from `losses`. Pure.

    Args:
        settings: `beta`, `gamma` and `label_smoothing` of `losses`.
        trainable, frozen: the two parts of the parameters.
        key: PRNG key of the adapters' dropout; None to disable it.
    """
    rngs = None if key is None else {"dropout": key}
    params = parts.join(trainable, frozen)
    policy, mask = scorer.logprobs(params, batch, scorer.image_tokens(params, batch, rngs), rngs)
    return losses(policy, mask, batch["weight"], **settings)


def task(model: LVLM, module: nn.Module, config: ConfigDict, workdir: Path) -> loop.Task:
    """See `registry.Objective`."""
    del workdir
    samples = Samples.pairs(model, config)
    scorer = Scorer(module, None, samples.image_count)
    return samples.task(functools.partial(metrics, scorer, config.simpo.to_dict()), {"preference": 1.0})


OBJECTIVE = Objective(
    "simpo",
    task,
    section="simpo",
    defaults={"beta": 2.0, "gamma": 0.5, "label_smoothing": 0.0},
    docs={
        "beta": "scale of an answer's reward, its mean log-probability",
        "gamma": "the margin that the chosen answer's reward should have over the rejected one's",
        "label_smoothing": "share of pairs whose order is wrong",
    },
    checks=(
        Check("beta", "a number above 0, such as 2.0", lambda value: value > 0),
        Check("gamma", "a margin of at least 0, such as 0.5", lambda value: value >= 0),
        Check("label_smoothing", "a share from 0 to below 0.5", lambda value: 0 <= value < 0.5),
    ),
)
