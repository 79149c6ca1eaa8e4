"""Supervised fine-tuning: next-token loss on the answers of conversations, optionally under a method."""

import functools
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from lvlm_jax.lvlm import LVLM
from lvlm_jax.methods import Method
from lvlm_jax.methods.parse import as_method
from lvlm_jax.training import forward, loop, trained_under
from lvlm_jax.training.data.pair_batches import CONVERSATION, Batch
from lvlm_jax.training.losses import Mean, accuracy, cross_entropy
from lvlm_jax.training.registry import Objective
from lvlm_jax.training.samples import Samples
from lvlm_jax.weights import parts


def metrics(
    module: nn.Module,
    trainable: Any,
    frozen: Any,
    batch: Batch,
    key: jax.Array | None,
    method: Method | None = None,
    image_count: int = 1,
) -> dict[str, Mean]:
    """`loss` (nats) and `accuracy` over the answer tokens of a batch; a token has its row's weight. Pure.

    Args:
        trainable, frozen: the two parts of the parameters.
        key: PRNG key of the adapters' dropout; None to disable it.
        method: the method whose attention is active, or None.
        image_count: the largest number of images in a conversation.
    """
    rngs = None if key is None else {"dropout": key}
    params, sequence = parts.join(trainable, frozen), batch[CONVERSATION[0]]
    image_tokens = forward.image_tokens(module, params, batch, rngs)
    embedded = forward.embed(module, params, sequence["tokens"], image_tokens)
    image_id, axes = sequence["image_id"], sequence.get("axes")
    decoded = forward.decode(module, params, image_id, embedded, method, image_count, rngs=rngs, axes=axes)
    logits, targets, mask = forward.answer_logits(module, params, decoded.hidden[0], sequence, rngs)
    weight = mask * batch["weight"][:, None]
    return {"loss": cross_entropy(logits, targets, weight), "accuracy": accuracy(logits, targets, weight)}


def task(model: LVLM, module: nn.Module, config: ConfigDict, workdir: Path) -> loop.Task:
    """See `registry.Objective`. The chosen answers of preference pairs are learned."""
    del workdir
    method = trained_under.method_of(config.sft.method, model, config.model)
    samples = Samples.conversations(model, config)
    pure = functools.partial(metrics, module, method=method, image_count=samples.image_count)
    return samples.task(pure, {"loss": 1.0}, method=method)


OBJECTIVE = Objective(
    "sft",
    task,
    section="sft",
    defaults={"method": "none"},
    docs={"method": trained_under.DOC},
    checks=(trained_under.CHECK,),
    method=lambda config: as_method(config.sft.method),
)
