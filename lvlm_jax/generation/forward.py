"""Pure functions from parameters and a prompt to logits: full forward, prefill, decode step.

They know no model family: a module offers `encode_images`, `embed`, `decode` and `head`. The compute dtype is that
of the parameters. `config` is static, `window`, `capacity` and switches too.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lvlm_jax import models
from lvlm_jax.attention import Context, LayerCache, Transform
from lvlm_jax.attention.attend import shifted
from lvlm_jax.attention.context import image_end
from lvlm_jax.attention.rotary import Rotation, frequencies
from lvlm_jax.generation.state import State, Step
from lvlm_jax.methods import Method
from lvlm_jax.models.decoder import Decoded


def encode_images(params: dict, config: Any, pixels: Float[Array, "I 3 Y X"]) -> Float[Array, "I P E"]:
    """Image tokens as the decoder receives them."""
    return _apply(params, config, "encode_images", pixels)


def embed(
    params: dict, config: Any, tokens: Int[Array, "B T"], image_tokens: Float[Array, "I P E"] | None
) -> Float[Array, "B T E"]:
    """Decoder inputs: token embeddings with the image tokens in their places."""
    return _apply(params, config, "embed", tokens, image_tokens)


def full_logits(
    params: dict,
    config: Any,
    embeddings: Float[Array, "B T E"],
    image_id: Int[Array, "B T"],
    method: Method | None,
    window: int,
) -> Float[Array, "B T V"]:
    """Logits of every row in one pass without a cache: the main branch, when a method has several."""
    transforms = _branches(method)[:1]
    context = _prompt_context(image_id, method, _explicit_rows(method, transforms, window, image_id.shape[1]))
    decoded = _apply(params, config, "decode", embeddings[None], context, None, transforms)
    return _apply(params, config, "head", decoded.hidden[0])


def prefill(
    params: dict,
    config: Any,
    embeddings: Float[Array, "B T E"],
    image_id: Int[Array, "B T"],
    method: Method | None,
    window: int,
    capacity: int,
    share_prefix: bool = True,
    tap: bool = False,
) -> tuple[State, Step]:
    """Runs the prompt.

    With a contrast branch, rows that no branch edits are run once and their columns shared; the last rows are run
    for all branches together.

    Args:
        window: how many of the last rows hold all post-image rows (`Inputs.window`).
        capacity: columns of the caches, prompt included.
        share_prefix: False runs the whole prompt for every branch.
        tap: whether this step and later ones return attention weights.
    """
    total = image_id.shape[1]
    transforms = _branches(method)
    rows = _explicit_rows(method, transforms, window, total)
    split = total - rows if len(transforms) > 1 and share_prefix else 0
    caches = None
    if split:
        before = _prompt_context(image_id[:, :split], None, 0)
        seen = _apply(params, config, "decode", embeddings[None, :, :split], before).columns
        caches = tuple(LayerCache(columns.own[0], ()) for columns in seen)
    context = _prompt_context(image_id, method, rows, first_row=split)
    branched = jnp.broadcast_to(embeddings[None, :, split:], (len(transforms), *embeddings[:, split:].shape))
    decoded = _apply(params, config, "decode", branched, context, caches, transforms, tap)
    state = State(
        caches=tuple(_cache(columns, config, context, capacity) for columns in decoded.columns),
        image_id=jnp.pad(image_id, ((0, 0), (0, capacity - total)), constant_values=-1),
        image_end=context.image_end,
        position=(image_id >= 0).sum(axis=1, dtype=jnp.int32),
        index=jnp.asarray(total, jnp.int32),
        method=method,
        memory=method.start(image_id.shape[0]) if method else (),
        tap=tap,
    )
    return _finish(params, config, state, decoded)


def decode_step(params: dict, config: Any, state: State, tokens: Int[Array, "B"]) -> tuple[State, Step]:
    """Appends one token per sample and returns the logits of the next."""
    method = state.method
    transforms = _branches(method)
    image_id = jax.lax.dynamic_update_slice(
        state.image_id, jnp.zeros_like(state.image_id, shape=(tokens.shape[0], 1)), (0, state.index)
    )
    context = Context(
        image_id=image_id,
        positions=state.position[:, None],
        first_row=state.index,
        image_end=state.image_end,
        phase="decode",
        explicit_rows=1,
    )
    embedded = embed(params, config, tokens[:, None], None)
    branched = jnp.broadcast_to(embedded[None], (len(transforms), *embedded.shape))
    decoded = _apply(params, config, "decode", branched, context, state.caches, transforms, state.tap)
    advanced = State(
        caches=decoded.columns,
        image_id=image_id,
        image_end=state.image_end,
        position=state.position + 1,
        index=state.index + 1,
        method=method,
        memory=state.memory,
        tap=state.tap,
    )
    return _finish(params, config, advanced, decoded)


def _finish(params: dict, config: Any, state: State, decoded: Decoded) -> tuple[State, Step]:
    """Head on the last row, then the method's combination of branches."""
    logits = _apply(params, config, "head", decoded.hidden[:, :, -1])
    main, contrast = logits[0], logits[1] if logits.shape[0] > 1 else None
    combined, memory = main, state.memory
    if state.method is not None:
        combined, memory = state.method.combine(main, contrast, decoded.carries[0], memory)
    return dataclasses.replace(state, memory=memory), Step(main, contrast, combined, decoded.attention)


def _cache(columns: LayerCache, config: Any, context: Context, capacity: int) -> LayerCache:
    """Fresh prompt columns as a decode cache: image keys calibrated, own blocks padded to the capacity."""
    if context.image_shift is not None:
        # Every later row comes after the images, so none needs the ordinary image keys again.
        frequency = frequencies(config.text.rope, config.text.head_dim)
        columns = shifted(columns, Rotation.at(context.image_shift, frequency))
    own = capacity - (columns.prefix.length if columns.prefix else 0)
    return LayerCache(columns.prefix, tuple(block.padded(own) for block in columns.own))


def _prompt_context(
    image_id: Int[Array, "B S"], method: Method | None, explicit_rows: int, first_row: int = 0
) -> Context:
    """The context of prompt rows `first_row ... S`, which see all S columns."""
    positions = jnp.maximum(jnp.cumsum(image_id >= 0, axis=1, dtype=jnp.int32) - 1, 0)
    image = image_id > 0
    shift = None
    if method is not None:
        images_before = jnp.cumsum(image, axis=1, dtype=jnp.int32) - image
        seen_at = method.positions(
            positions, images_before, image.sum(axis=1, keepdims=True, dtype=jnp.int32)
        )
        if seen_at is not None:
            shift = jnp.where(image, seen_at - positions, 0.0)
    return Context(
        image_id=image_id,
        positions=positions[:, first_row:],
        first_row=jnp.asarray(first_row, jnp.int32),
        image_end=image_end(image_id),
        image_shift=shift,
        phase="prefill",
        explicit_rows=explicit_rows,
    )


def _branches(method: Method | None) -> tuple[Transform | None, ...]:
    return (None,) if method is None else method.branches()


def _explicit_rows(
    method: Method | None, transforms: tuple[Transform | None, ...], window: int, total: int
) -> int:
    """How many of the last prompt rows the method can change in any branch; rows before them are all alike."""
    rows = {"last": 1, "post_image": window, "all": total}
    needed = [rows[transform.rows] for transform in transforms if transform is not None]
    if method is not None and method.positions(*jnp.zeros((3,), jnp.int32)) is not None:
        needed.append(window)
    return max(needed, default=0 if len(transforms) == 1 else 1)


def _apply(params: dict, config: Any, function: str, *arguments: Any) -> Any:
    dtype = params["language_model"]["embed_tokens"]["embedding"].dtype
    return models.build(config, dtype).apply({"params": params}, *arguments, method=function)
