"""The forward pass of training: whole rows at once, without a cache, with logits only where they are needed.

Rows are right-padded: prompt, answer, padding (`image_id` -1). Results for a row's tokens equal those of
`generation.forward.full_forward` for the same tokens left-padded.

A sequence is a dict of arrays, B rows of T columns, made by `pair_batches`:

    tokens    Int[B, T]   right-padded with the pad token
    answers   Bool[B, T]  the tokens to learn, stop token included
    image_id  Int[B, T]   0 for text, k >= 1 for the row's k-th image, -1 for padding
    columns   Int[B, A]   columns of the answer tokens, in order; then 0, which is never an answer
    axes      Int[B, 3, T]   positions along time, height and width, for models that use them; else absent
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.attention import Tap
from lvlm_jax.generation.forward import prompt_context
from lvlm_jax.methods import Method
from lvlm_jax.models.decoder import DecoderOutput
from lvlm_jax.training import placement

Sequence = Mapping[str, jax.Array]
Rngs = Mapping[str, jax.Array] | None  # {"dropout": key}, or None for no dropout

NOTHING = Tap()


def encode_images(
    module: nn.Module,
    params: Any,
    pixels: Float[Array, "R ..."],
    rngs: Rngs = None,
    geometry: Mapping[str, jax.Array] | None = None,
) -> Float[Array, "*N E"]:
    """Image tokens for the decoder; `pixels` and `geometry` as in `models.pictures.Pictures`."""
    return module.apply({"params": params}, pixels, **(geometry or {}), method="encode_images", rngs=rngs)


def image_tokens(module: nn.Module, params: Any, batch: Mapping[str, Any], rngs: Rngs = None) -> Float[Array, "*N E"]:
    """The image tokens of a batch from `pair_batches`."""
    return encode_images(module, params, batch["images"], rngs, batch.get("geometry"))


def embed(
    module: nn.Module, params: Any, tokens: Int[Array, "B T"], image_tokens: Float[Array, "*N E"]
) -> Float[Array, "B T E"]:
    """Token embeddings with the image tokens in the places of the rows' placeholders, in reading order.

    From here on, every device of a mesh has its own rows (`placement.by_rows`).
    """
    return placement.by_rows(module.apply({"params": params}, tokens, image_tokens, method="embed"))


def decode(
    module: nn.Module,
    params: Any,
    image_id: Int[Array, "B T"],
    embeddings: Float[Array, "B T E"],
    method: Method | None = None,
    image_count: int = 1,
    tap: Tap = NOTHING,
    rngs: Rngs = None,
    axes: Int[Array, "B A T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    answer: Int[Array, "B T"] | None = None,
) -> DecoderOutput:
    """One pass through the decoder, with the attention of the method's main branch in all rows.

    Args:
        image_id: 0 for text, k >= 1 for the k-th image, -1 for padding.
        method: applied in the decoder; None leaves the model unmodified.
        image_count: the largest number of images in a row.
        tap: attention weights or hidden states to return besides.
        rngs: random keys for adapters with dropout.
        axes: positions along each position axis, if the model has several.
        positions: position of each row, if positions are not the numbers of tokens before each row.
        answer: which of several answers to one prompt a token belongs to, as in `Context`; None for one answer.
    """
    total = image_id.shape[1]
    axes = None if axes is None else axes.swapaxes(0, 1)
    context = prompt_context(image_id, method, total if method else 0, image_count, axes=axes)
    context = dataclasses.replace(context, streams=True, answer=answer)
    if positions is not None:
        context = dataclasses.replace(context, positions=positions)
    transforms = method.branches()[:1] if method else None
    return module.apply(
        {"params": params}, embeddings[None], context, None, transforms, tap, method="decode", rngs=rngs
    )


def answer_logits(
    module: nn.Module, params: Any, hidden: Float[Array, "B T E"], sequence: Sequence, rngs: Rngs = None
) -> tuple[Float[Array, "B A V"], Int[Array, "B A"], Bool[Array, "B A"]]:
    """Logits that predict the answer tokens, the answer tokens, and which of the A places have a token.

    Logits over the vocabulary for every row would take most of a step's memory.
    """
    columns = sequence["columns"]
    # Row t predicts token t + 1, unless the sequence says otherwise (`one_row`).
    predicting = sequence["rows"] if "rows" in sequence else jnp.maximum(columns - 1, 0)
    rows = jnp.take_along_axis(hidden, predicting[..., None], axis=1)
    logits = module.apply({"params": params}, rows, method="head", rngs=rngs)
    targets = jnp.take_along_axis(sequence["tokens"], columns, axis=1)
    return logits, targets, jnp.take_along_axis(sequence["answers"], columns, axis=1)


def token_logprobs(
    logits: Float[Array, "*B A V"], targets: Int[Array, "*B A"], mask: Bool[Array, "*B A"]
) -> Float[Array, "*B A"]:
    """Log-probability in nats of each target, in float32; 0 outside the mask."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.where(mask, jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0], 0.0)
