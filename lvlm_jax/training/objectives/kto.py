"""KTO (arXiv 2402.01306): learning from answers that are labelled good or bad, without pairs.

With Δ(y) = log π(y) - log π_ref(y) summed over the tokens of an answer and z = max(0, mean Δ(y')) over a batch, where
y' are the answers of other rows:

    L = λ_D (1 - σ(β (Δ(y) - z))) for a good answer,   λ_U (1 - σ(β (z - Δ(y)))) for a bad one

No gradient flows through z. Values are those of TRL's KTOTrainer (`loss_type="kto"`), with one difference: y' is the
answer of the next row of the file here, and of the next row of a shuffled batch there. With `accumulate` above 1, each
part of a batch has its own z.
"""

import dataclasses
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
from lvlm_jax.training import loop, pairwise
from lvlm_jax.training.data import labelled
from lvlm_jax.training.data.labelled import Labelled
from lvlm_jax.training.data.pair_batches import Batch, EncodedRow, Encoder
from lvlm_jax.training.data.pair_files import assistant
from lvlm_jax.training.losses import Mean
from lvlm_jax.training.pairwise import Scorer
from lvlm_jax.training.preference_losses import per_pair
from lvlm_jax.training.registry import Check, Objective
from lvlm_jax.training.samples import Samples

SEQUENCES = ("answer", "mismatched")


def losses(
    policy: Float[Array, "B 2 A"],
    reference: Float[Array, "B 2 A"],
    mask: Bool[Array, "B 2 A"],
    desirable: Float[Array, "B"],
    weight: Float[Array, "B"],
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> dict[str, Mean]:
    """Loss and metrics of B answers of at most A tokens.

    Args:
        policy, reference: log-probabilities of the tokens of each answer, then of its mismatched answer, in nats.
        mask: which of the A places have a token.
        desirable: 1 for a good answer, 0 for a bad one.
        weight: weight of each row; 0 leaves it out.
        desirable_weight, undesirable_weight: λ_D and λ_U.

    Returns:
        `loss`, `rewards/chosen` (β Δ of good answers) and `rewards/rejected` (of bad ones), each over rows; `z` of the
            batch.
    """
    delta = jnp.where(mask, policy - reference, 0.0).sum(axis=-1)
    present = (weight > 0).astype(jnp.float32)
    z = jax.lax.stop_gradient(jnp.maximum(per_pair(delta[:, 1], present).value, 0.0))
    good = desirable > 0
    sign = jnp.where(good, 1.0, -1.0)
    share = jnp.where(good, desirable_weight, undesirable_weight)
    loss = share * (1 - jax.nn.sigmoid(beta * sign * (delta[:, 0] - z)))
    rewards = beta * delta[:, 0]
    return {
        "loss": per_pair(loss, weight),
        "rewards/chosen": per_pair(rewards, weight * good),
        "rewards/rejected": per_pair(rewards, weight * ~good),
        "z": Mean(z * present.sum(), present.sum()),
    }


def metrics(
    scorer: Scorer, settings: Mapping[str, float], trainable: Any, frozen: Any, batch: Batch, key: jax.Array | None
) -> dict[str, Mean]:
    """The loss and metrics of a batch, from `losses`. Pure.

    Args:
        scorer: scorer of the sequences `SEQUENCES`.
        settings: `beta`, `desirable_weight` and `undesirable_weight` of `losses`.
        trainable, frozen, key: as in `Scorer.beside_reference`.
    """
    logprobs = []
    for number, name in enumerate(SEQUENCES):
        one = dataclasses.replace(scorer, sequences=(name,))
        part = {**batch, "reference": batch["reference"][:, number, None]} if "reference" in batch else batch
        # No gradient flows through z, so none is computed.
        parameters = trainable if name == SEQUENCES[0] else jax.lax.stop_gradient(trainable)
        logprobs.append(one.beside_reference(parameters, frozen, part, key))
    policy, reference, mask = (jnp.concatenate(arrays, axis=1) for arrays in zip(*logprobs, strict=True))
    return losses(policy, reference, mask, batch["desirable"], batch["weight"], **settings)


def encode(encoder: Encoder, example: Labelled) -> EncodedRow:
    """The row of an answer: the prompt with the answer, and with the mismatched answer.

    Raises:
        LVLMError: as `Encoder.pair`.
    """
    texts = (example.answer, example.mismatched)
    messages = {name: [*example.prompt, assistant(text.strip())] for name, text in zip(SEQUENCES, texts, strict=True)}
    row = encoder.row(example, messages, last_only=True)
    return dataclasses.replace(row, labels={"desirable": float(example.desirable)})


def task(model: LVLM, module: nn.Module, config: ConfigDict, workdir: Path) -> loop.Task:
    """See `registry.Objective`; precomputed log-probabilities are stored in the folder `reference` of `workdir`."""
    samples = Samples.read(model, config, labelled.read, encode, "labelled answers", "answers.jsonl")
    scorer = Scorer(module, None, samples.image_count, SEQUENCES)
    samples = pairwise.with_reference(samples, scorer, config.kto.reference, workdir)
    settings = {name: config.kto[name] for name in ("beta", "desirable_weight", "undesirable_weight")}
    return samples.task(functools.partial(metrics, scorer, settings), {"loss": 1.0})


def _above_0(field: str) -> Check:
    return Check(field, "a number above 0, such as 1.0", lambda value: value > 0)


OBJECTIVE = Objective(
    "kto",
    task,
    section="kto",
    defaults={"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, "reference": "auto"},
    docs={
        "beta": pairwise.DOCS["beta"],
        "desirable_weight": "weight of good answers; make it larger if they are few, so that both kinds count equally",
        "undesirable_weight": "weight of bad answers",
        "reference": pairwise.DOCS["reference"],
    },
    checks=(pairwise.BETA, pairwise.REFERENCE, _above_0("desirable_weight"), _above_0("undesirable_weight")),
    check=functools.partial(pairwise.check_reference, "kto"),
)
