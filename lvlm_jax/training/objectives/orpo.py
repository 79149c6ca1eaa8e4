"""ORPO (arXiv 2403.07691): learns chosen answers and the preference for them at once, without a reference model.

    L = NLL(y_w) - λ log σ(log odds(y_w) - log odds(y_l)),   odds(y) = p / (1 - p),   log p = 1/|y| log π(y)

y_w is the chosen answer, y_l the rejected one, |y| the number of tokens of an answer, its stop token included. NLL is
the mean over all chosen tokens of a batch. λ is 0.1 as in the paper's larger models. TRL's ORPOTrainer has the same
odds ratio (its `beta` is λ). Its NLL also counts the prompt's tokens; the NLL here and in the paper counts only the
answer's tokens.
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


def losses(policy: Float[Array, "B 2 A"], mask: Bool[Array, "B 2 A"], weight: Float[Array, "B"]) -> dict[str, Mean]:
    """Losses and metrics of B pairs of answers of at most A tokens.

    Args:
        policy: log-probabilities of the answer tokens in nats; chosen first, then rejected.
        mask: which of the A places have a token.
        weight: weight of each pair; 0 leaves it out.

    Returns:
        Per pair: `preference` (-log σ of the log odds ratio), `log_odds` (that ratio), `rewards/accuracy` (whether it
            is above 0), `logps/chosen`, `logps/rejected` (log π of the whole answer). Per token: `sft` (NLL of
            the chosen answers).
    """
    logps = jnp.where(mask, policy, 0.0).sum(axis=-1)
    tokens = mask.sum(axis=-1, dtype=jnp.float32)
    mean = logps / jnp.maximum(tokens, 1)
    # An answer of probability 1 has infinite odds.
    mean = jnp.minimum(mean, -jnp.finfo(jnp.float32).eps)
    odds = mean - jnp.log(-jnp.expm1(mean))
    ratio = odds[:, 0] - odds[:, 1]
    result = {
        "preference": preferred(ratio),
        "log_odds": ratio,
        "rewards/accuracy": (ratio > 0).astype(jnp.float32),
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, 1],
    }
    likelihood = Mean(-jnp.sum(logps[:, 0] * weight), jnp.sum(tokens[:, 0] * weight))
    return {name: per_pair(values, weight) for name, values in result.items()} | {"sft": likelihood}


def metrics(scorer: Scorer, trainable: Any, frozen: Any, batch: Batch, key: jax.Array | None) -> dict[str, Mean]:
    """The loss and metrics of a batch, from `losses`. Pure.

    Args:
        trainable, frozen: the two parts of the parameters.
        key: PRNG key of the adapters' dropout; None to disable it.
    """
    rngs = None if key is None else {"dropout": key}
    params = parts.join(trainable, frozen)
    policy, mask = scorer.logprobs(params, batch, scorer.image_tokens(params, batch, rngs), rngs)
    return losses(policy, mask, batch["weight"])


def terms(settings: Mapping[str, float]) -> dict[str, float]:
    """The metrics to minimise, with weights."""
    return {"sft": 1.0, "preference": settings["lambda_"]}


def task(model: LVLM, module: nn.Module, config: ConfigDict, workdir: Path) -> loop.Task:
    """See `registry.Objective`."""
    del workdir
    samples = Samples.pairs(model, config)
    scorer = Scorer(module, None, samples.image_count)
    return samples.task(functools.partial(metrics, scorer), terms(config.orpo))


OBJECTIVE = Objective(
    "orpo",
    task,
    section="orpo",
    defaults={"lambda_": 0.1},
    docs={"lambda_": "weight of the odds ratio beside the likelihood of chosen answers"},
    checks=(Check("lambda_", "a number above 0, such as 0.1", lambda value: value > 0),),
)
