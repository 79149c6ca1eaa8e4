"""Supervised fine-tuning as a task: next-token loss on the answers of conversations about images."""

import functools
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from lvlm_jax.errors import LVLMError
from lvlm_jax.lvlm import LVLM
from lvlm_jax.training import forward, loop
from lvlm_jax.training.data import pair_batches, pair_files
from lvlm_jax.training.data.pair_batches import CONVERSATION, Batch, Batches, Encoder, Row
from lvlm_jax.training.losses import Mean, accuracy, cross_entropy
from lvlm_jax.training.validation import evaluation
from lvlm_jax.weights import parts


def objective(
    module: nn.Module, trainable: Any, frozen: Any, batch: Batch, key: jax.Array | None
) -> dict[str, Mean]:
    """`loss` (nats) and `accuracy` over the answer tokens of a batch. Pure.

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
    return {
        "loss": cross_entropy(logits, targets, mask),
        "accuracy": accuracy(logits, targets, mask),
    }


def task(model: LVLM, module: nn.Module, config: ConfigDict, workdir: Path) -> loop.Task:
    """The task of recipe "sft".

    Args:
        model: the base model.
        module: its module for training.
        config: fields `recipe`, `seed`, `data`, `validation`, `batch`, `accumulate`, `length` and `too_long`, see
            `training.settings`. Both files are JSON lines `{"images", "messages"}`, or preference pairs, of which the
            chosen answers are learned.
        workdir: of the run; nothing is kept there.

    Raises:
        LVLMError: conversations that cannot be used.
    """
    del workdir
    encoder = Encoder(model.processor, model.config)
    rows = _rows(config.data, encoder, config)
    held_out = _rows(config.validation, encoder, config) if config.validation else ()
    pure = functools.partial(objective, module)
    source = Batches(rows, encoder, config.batch, config.accumulate, config.seed)
    return loop.Task(
        name=config.recipe,
        objective=pure,
        terms={"loss": 1.0},
        source=source,
        evaluate=evaluation(pure, held_out, encoder, config.batch // config.accumulate, model.mesh),
        describe=source.describe,
    )


def _rows(path: str, encoder: Encoder, config: ConfigDict) -> tuple[Row, ...]:
    if not path:
        raise LVLMError(
            "data is not set; give a file of conversations, as in --config.data=conversations.jsonl"
        )
    conversations = pair_files.read_conversations(path)
    return pair_batches.rows_of(conversations, encoder.conversation, encoder, config.length, config.too_long)
