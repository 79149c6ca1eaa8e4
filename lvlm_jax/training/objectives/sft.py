"""Supervised fine-tuning: next-token loss on the answers of conversations about images."""

import functools
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from lvlm_jax.lvlm import LVLM
from lvlm_jax.training import forward, loop
from lvlm_jax.training.data.pair_batches import CONVERSATION, Batch
from lvlm_jax.training.losses import Mean, accuracy, cross_entropy
from lvlm_jax.training.registry import Objective
from lvlm_jax.training.samples import Samples
from lvlm_jax.weights import parts


def metrics(module: nn.Module, trainable: Any, frozen: Any, batch: Batch, key: jax.Array | None) -> dict[str, Mean]:
    """`loss` (nats) and `accuracy` over the answer tokens of a batch, each with its row's weight. Pure.

    Args:
        trainable, frozen: the two parts of the parameters.
        key: of the adapters' dropout; None for none.
    """
    rngs = None if key is None else {"dropout": key}
    params, sequence = parts.join(trainable, frozen), batch[CONVERSATION[0]]
    image_tokens = forward.image_tokens(module, params, batch, rngs)
    embedded = forward.embed(module, params, sequence["tokens"], image_tokens)
    image_id, axes = sequence["image_id"], sequence.get("axes")
    decoded = forward.decode(module, params, image_id, embedded, rngs=rngs, axes=axes)
    logits, targets, mask = forward.answer_logits(module, params, decoded.hidden[0], sequence, rngs)
    weight = mask * batch["weight"][:, None]
    return {"loss": cross_entropy(logits, targets, weight), "accuracy": accuracy(logits, targets, weight)}


def task(model: LVLM, module: nn.Module, config: ConfigDict, workdir: Path) -> loop.Task:
    """See `registry.Objective`. Of preference pairs the chosen answers are learned."""
    del workdir
    return Samples.conversations(model, config).task(functools.partial(metrics, module), {"loss": 1.0})


OBJECTIVE = Objective("sft", task)
