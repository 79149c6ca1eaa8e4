"""Pure functions from parameters and a prompt to logits: full forward, prefill, decode step.

They do not depend on the model family: a module has `encode_images`, `embed`, `decode`, `head` and `exit_logits`. The
compute dtype is that of the parameters. `config`, `tail_rows`, `capacity` and switches are static.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lvlm_jax import models
from lvlm_jax.attention import Block, Context, LayerCache, Tap, Tapped, Transform
from lvlm_jax.attention.attend import shifted
from lvlm_jax.attention.context import image_end
from lvlm_jax.attention.transform import STREAM_STAGES, overrides
from lvlm_jax.generation.state import Memory, Prompt, State, Step, Track
from lvlm_jax.methods import Method, Readout
from lvlm_jax.methods.base import OTHER_LAYOUTS, OTHER_TOKENS, contrast_kind
from lvlm_jax.methods.tower import TowerEdit
from lvlm_jax.models.config import DecoderConfig
from lvlm_jax.models.decoder import DecoderOutput, shift_rotation
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.models.vision import with_edited_outputs

NOTHING = Tap()
STREAM_FROM = 256  # number of prompt columns from which attention runs block by block; that is then faster on a CPU too


def encode_images(
    params: dict,
    config: FamilyConfig,
    pixels: Float[Array, "R ..."],
    geometry: dict[str, Array] | None = None,
    edit: TowerEdit | None = None,
) -> Float[Array, "*N E"]:
    """Image tokens for the decoder; arguments as in `models.pictures.Pictures`, and a method's `tower_edit`."""

    def encode() -> Float[Array, "*N E"]:
        return apply(params, config, "encode_images", pixels, **(geometry or {}))

    if edit is None:
        return encode()
    return with_edited_outputs(encode, "mlp", lambda layer, output: edit.mlp(layer, output).astype(output.dtype))


def encode_edited(
    params: dict,
    config: FamilyConfig,
    pixels: Float[Array, "R ..."],
    method: Method,
    geometry: dict[str, Array] | None = None,
) -> Float[Array, "*N E"]:
    """`encode_images` with the `tower_values` of a method."""

    def edit(layer: int, values: Float[Array, "R P C"]) -> Float[Array, "R P C"]:
        valid = (geometry or {}).get("valid", jnp.ones(values.shape[:2], bool))
        return method.tower_values(layer, values, valid)

    return with_edited_outputs(lambda: encode_images(params, config, pixels, geometry), "v_proj", edit)


def salience(
    params: dict, config: FamilyConfig, pixels: Float[Array, "R ..."], geometry: dict[str, Array] | None = None
) -> Float[Array, "N"]:
    """The attention that the tower's class token pays to each image token, in reading order."""
    return apply(params, config, "salience", pixels, **(geometry or {}))


def with_fewer_tokens(method: Method, prompt: Prompt, salience: Float[Array, "N"], image_count: int) -> Prompt:
    """The prompt without the image tokens that the method leaves out; the other columns move to the right end."""
    image = prompt.image_id > 0
    order = jnp.cumsum(image.reshape(-1)).reshape(image.shape) - 1
    of_columns = jnp.where(image, salience[jnp.clip(order, 0, salience.shape[0] - 1)], 0)
    remains = method.keep_tokens(prompt.image_id, image_count, of_columns)
    columns = jnp.argsort(remains, axis=1, stable=True)  # removed columns first
    image_id = jnp.take_along_axis(jnp.where(remains, prompt.image_id, -1), columns, axis=1)
    embeddings = jnp.take_along_axis(prompt.embeddings, columns[..., None], axis=1)
    axes = None if prompt.axes is None else jnp.take_along_axis(prompt.axes, columns[None], axis=2)
    return Prompt(embeddings, image_id, axes)


def embed(
    params: dict, config: FamilyConfig, tokens: Int[Array, "B T"], image_tokens: Float[Array, "*N E"] | None
) -> Float[Array, "B T E"]:
    """Decoder inputs: token embeddings with the image tokens in their places."""
    return apply(params, config, "embed", tokens, image_tokens)


def full_forward(
    params: dict,
    config: FamilyConfig,
    prompt: Prompt,
    method: Method | None,
    tail_rows: int,
    image_count: int = 1,
    tap: Tap = NOTHING,
) -> tuple[Float[Array, "B T V"], Tapped]:
    """Logits of every row of the main branch, in one pass without a cache; and the tapped arrays."""
    transforms = transforms_of(method)[:1]
    rows = _explicit_rows(method, transforms, tail_rows, prompt.image_id.shape[1])
    context = prompt_context(prompt.image_id, method, rows, image_count, axes=prompt.axes)
    decoded = apply(params, config, "decode", prompt.embeddings[None], context, None, transforms, tap)
    logits = apply(params, config, "head", decoded.hidden[0])
    return logits, _with_exit_logits(params, config, decoded.tapped)


def probe(params: dict, config: FamilyConfig, prompt: Prompt, transform: Transform, image_count: int = 1) -> Any:
    """The carry of a transform after the last layer of a prompt; the transform may edit all rows."""
    context = prompt_context(prompt.image_id, None, prompt.image_id.shape[1], image_count, axes=prompt.axes)
    return apply(params, config, "decode", prompt.embeddings[None], context, None, (transform,)).carries[0]


def prefill(
    params: dict,
    config: FamilyConfig,
    prompt: Prompt,
    method: Method | None,
    tail_rows: int,
    capacity: int,
    contrast: Prompt | None = None,
    contrast_capacity: int = 0,
    image_count: int = 1,
    share_prefix: bool = True,
    tap: Tap = NOTHING,
    before: tuple[LayerCache, ...] | None = None,
) -> tuple[State, Step]:
    """Runs the prompt.

    If the contrast branch reads the same prompt, rows that no branch edits run once and share their columns; the last
    rows run for all branches together. A contrast branch with other images in the same columns becomes another row of
    the batch; one with another layout runs by itself.

    Args:
        tail_rows: how many of the last rows contain all post-image rows (`Inputs.tail_rows`).
        capacity: columns of the caches, prompt included.
        contrast: the contrast branch's input, if it is not `prompt`.
        contrast_capacity: columns of the contrast branch's caches, if its layout differs.
        image_count: the largest number of images in a sample.
        share_prefix: False runs the whole prompt for every branch.
        tap: what this step and later ones return besides logits.
        before: the result of `prefix` for the beginning of the prompt, if it has already run; `prompt.embeddings` are
            then those of the rest, which must include the `edited_rows`.
    """
    total = prompt.image_id.shape[1]
    transforms = transforms_of(method)
    kind = contrast_kind(method)
    apart = kind in OTHER_LAYOUTS
    together = transforms[:1] if apart else transforms
    rows = _explicit_rows(method, together, tail_rows, total)
    shared = len(together) > 1 and kind == "same" and share_prefix and tap.rows == "last"
    split = total - rows if shared else 0
    rest, caches = prompt.embeddings[None, :, split:], None
    if before is not None:
        split, caches, rest = before[0].prefix.length, before, prompt.embeddings[None]
    elif split:
        # If the split lies inside an image and image tokens see later ones, they also need the rows after the split.
        end = total if config.text.whole_images else split
        caches = prefix(params, config, prompt, end, split, image_count)
    context = prompt_context(prompt.image_id, method, rows, image_count, split, prompt.axes)
    if kind in OTHER_TOKENS:
        further = [prompt.embeddings] * (len(together) - 2)
        branched = jnp.stack([prompt.embeddings, contrast.embeddings, *further])
    else:
        branched = jnp.broadcast_to(rest, (len(together), *rest.shape[1:]))
    full_tap = _with_method_exits(method, config, tap)
    decoded = apply(params, config, "decode", branched, context, caches, together, full_tap)
    caches = tuple(
        _cache(columns, config.text, layer, context, capacity) for layer, columns in enumerate(decoded.columns)
    )
    tracks = (Track.after(prompt, context, capacity),)
    last = decoded.hidden[:, :, -1]
    if apart:
        other_context = prompt_context(contrast.image_id, None, 0, image_count, axes=contrast.axes)
        other = apply(params, config, "decode", contrast.embeddings[None], other_context)
        caches = tuple(
            LayerCache(None, (*cache.own, columns.own[0].padded(contrast_capacity)))
            for cache, columns in zip(caches, other.columns, strict=True)
        )
        tracks += (Track.after(contrast, other_context, contrast_capacity),)
        last = jnp.concatenate([last, other.hidden[:, :, -1]])
    memory = Memory(method.start(prompt.image_id.shape[0]) if method else (), None)
    return _finish(params, config, State(caches, tracks, method, memory, tap), last, decoded)


def prefix(
    params: dict, config: FamilyConfig, prompt: Prompt, end: int, split: int, image_count: int = 1
) -> tuple[LayerCache, ...]:
    """The first `split` columns of a prompt in every layer, which all branches share.

    Args:
        end: how many rows to run; more than `split` only if image tokens see later ones.
        split: how many columns to return. No method edits their rows.
    """
    axes = None if prompt.axes is None else prompt.axes[:, :, :end]
    context = prompt_context(prompt.image_id[:, :end], None, 0, image_count, axes=axes)
    prefix_columns = apply(params, config, "decode", prompt.embeddings[None, :, :end], context).columns
    return tuple(LayerCache(columns.own[0].first(split), ()) for columns in prefix_columns)


def extended(
    params: dict,
    config: FamilyConfig,
    prompt: Prompt,
    caches: tuple[LayerCache, ...] | None,
    start: Int[Array, ""],
    rows: int,
    split: int,
    image_count: int = 1,
) -> tuple[LayerCache, ...]:
    """Runs `rows` more rows of a prompt, and adds their columns to the caches of every layer; see `chunks`.

    Args:
        caches: `split` columns, of which those before `start` are written; None at the beginning.
        start: the first row to run. No method edits any of the rows that run.
        split: number of columns of the caches.
    """
    image_id = prompt.image_id[:, :split]
    axes = None if prompt.axes is None else prompt.axes[:, :, :split]
    context = prompt_context(image_id, None, 0, image_count, axes=axes).cut(start, rows)
    part = jax.lax.dynamic_slice_in_dim(prompt.embeddings, start, rows, axis=1)
    if caches is None:
        text = config.text
        empty = jnp.zeros((image_id.shape[0], text.num_kv_heads, split, text.head_dim), part.dtype)
        caches = (LayerCache(None, (Block(empty, empty),)),) * text.num_layers
    return apply(params, config, "decode", part[None], context, caches).columns


def edited_rows(method: Method | None, tail_rows: int, total: int) -> int:
    """How many of the last of `total` prompt rows a method edits; all if a branch has its own prompt."""
    if method is None:
        return 0
    return total if contrast_kind(method) != "same" else _edited_rows(jax.tree.structure(method), tail_rows, total)


def decode_step(params: dict, config: FamilyConfig, state: State, tokens: Int[Array, "B"]) -> tuple[State, Step]:
    """Appends one token per sample and returns the next logits."""
    method = state.method and state.method.recall(state.memory.edits)
    transforms = transforms_of(method)
    tracks = tuple(track.with_token() for track in state.tracks)
    contexts = tuple(track.newest() for track in tracks)
    embedded = embed(params, config, tokens[:, None], None)
    branched = jnp.broadcast_to(embedded[None], (len(transforms), *embedded.shape))
    decoded = apply(
        params,
        config,
        "decode",
        branched,
        contexts[0] if len(contexts) == 1 else contexts,
        state.caches,
        transforms,
        _with_method_exits(state.method, config, state.tap),
    )
    advanced = dataclasses.replace(state, caches=decoded.columns, tracks=tracks)
    return _finish(params, config, advanced, decoded.hidden[:, :, -1], decoded)


def prompt_context(
    image_id: Int[Array, "B S"],
    method: Method | None,
    explicit_rows: int,
    image_count: int,
    first_row: int = 0,
    axes: Int[Array, "A B S"] | None = None,
) -> Context:
    """The context of prompt rows `first_row ... S`, which see all S columns.

    Padding may be on either side; positions count the tokens of a sample.

    Args:
        image_id: 0 for text, k >= 1 for the k-th image, -1 for padding.
        method: its positions stage moves image tokens; None moves none.
        explicit_rows: how many of the last rows the method's stages see.
        image_count: the largest number of images in a sample.
        first_row: the column of the first row.
        axes: positions along every axis, if the model has several.
    """
    valid, image = image_id >= 0, image_id > 0
    positions = jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0) if axes is None else axes[0]
    shift = None
    if method is not None:
        # Text advances every axis by one, so the rest of a position comes from images: with one axis, the number of
        # their tokens; with several, the extents of earlier images plus the offset inside the token's own image.
        everywhere = positions if axes is None else axes
        text = valid & ~image
        from_images = everywhere - (jnp.cumsum(text, axis=1, dtype=jnp.int32) - text)
        last = jnp.where(valid, everywhere, -1).max(axis=-1)
        added = (last if axes is None else last.max(axis=0)) + 1 - text.sum(axis=1, dtype=jnp.int32)
        seen_at = method.positions(everywhere, from_images, added[:, None])
        if seen_at is not None:
            shift = jnp.where(image, seen_at - everywhere, 0.0)
    return Context(
        image_id=image_id,
        positions=positions[:, first_row:],
        axes=None if axes is None else axes[:, :, first_row:],
        first_row=jnp.asarray(first_row, jnp.int32),
        image_end=image_end(image_id),
        image_shift=shift,
        image_count=image_count,
        phase="prefill",
        explicit_rows=explicit_rows,
        streams=image_id.shape[1] >= STREAM_FROM,
    )


def _with_method_exits(method: Method | None, config: FamilyConfig, tap: Tap) -> Tap:
    """The caller's tap, extended by the hidden states that the method's early exits need."""
    depth = config.text.num_layers
    return tap if method is None else dataclasses.replace(tap, exits=tap.exits + method.exits(depth))


def _with_exit_logits(params: dict, config: FamilyConfig, tapped: Tapped) -> Tapped:
    """Turns the hidden states of the caller's early exits into logits."""
    if tapped.exits is None:
        return tapped
    return tapped._replace(exits=apply(params, config, "exit_logits", tapped.exits, True))


def _finish(
    params: dict, config: FamilyConfig, state: State, last: Float[Array, "N B E"], decoded: DecoderOutput
) -> tuple[State, Step]:
    """Computes the logits of the last row and of the early exits, and lets the method combine the branches."""
    tapped, exits, further, num_exits = decoded.tapped, None, None, len(state.tap.exits)
    if state.method is not None:
        further = state.method.further_exits(decoded.carries[0])
        if tapped.exits is not None:
            exits = tapped.exits[num_exits:, 0] if tapped.exits.shape[0] > num_exits else None
            tapped = tapped._replace(exits=tapped.exits[:num_exits] if num_exits else None)
    logits, exits = logits_with_exits(params, config, state.method, last, exits, further)
    main, contrast = logits[0], logits[1] if logits.shape[0] > 1 else None
    combined, memory = main, state.memory
    if state.method is not None:
        others = logits[2:] if logits.shape[0] > 2 else None
        readout = Readout(main, contrast, exits, decoded.carries[0], others)
        combined, new_memory = state.method.combine(readout, memory.logits)
        memory = Memory(new_memory, state.method.remember(decoded.carries[0], memory.edits))
    tapped = _with_exit_logits(params, config, tapped)
    return dataclasses.replace(state, memory=memory), Step(main, contrast, combined, tapped)


def logits_with_exits(
    params: dict,
    config: FamilyConfig,
    method: Method | None,
    hidden: Float[Array, "N *T E"],
    *exits: Float[Array, "X *T E"] | None,
) -> tuple[Float[Array, "N *T V"], Float[Array, "X *T V"] | None]:
    """Logits of the branches, and of all early exits of the method; None without any."""
    present = [states for states in exits if states is not None]
    if not present:
        return apply(params, config, "head", hidden), None
    return apply(params, config, "head_with_exits", hidden, jnp.concatenate(present), method.exit_norm)


def _cache(columns: LayerCache, config: DecoderConfig, layer: int, context: Context, capacity: int) -> LayerCache:
    """Turns prompt columns into a decode cache: rotates image keys to the method's positions, pads to the capacity."""
    if context.image_shift is not None:
        # All later rows come after the images, so the ordinary image keys are not needed again.
        rope = config.layer_rope(layer)
        columns = shifted(columns, shift_rotation(rope, config.head_dim, context.image_shift))
    own = capacity - (columns.prefix.length if columns.prefix else 0)
    return LayerCache(columns.prefix, tuple(block.padded(own) for block in columns.own))


def transforms_of(method: Method | None) -> tuple[Transform | None, ...]:
    """The attention edits of each branch."""
    return (None,) if method is None else method.branches()


def uses_tail_rows(method: Method | None) -> bool:
    """Whether the program depends on `tail_rows`; if not, one program serves prompts with any value."""
    return method is not None and _edited_rows(jax.tree.structure(method), 2, 4) == 2


@functools.lru_cache(maxsize=256)
def _edited_rows(structure: jax.tree_util.PyTreeDef, tail_rows: int, total: int) -> int:
    """`edited_rows` by a method's structure alone: strengths do not matter, and computing with them would cost time."""
    method = jax.tree.unflatten(structure, [1.0] * structure.num_leaves)
    return _explicit_rows(method, transforms_of(method), tail_rows, total)


def _explicit_rows(method: Method | None, transforms: tuple[Transform | None, ...], tail_rows: int, total: int) -> int:
    """How many of the last prompt rows the method can change in any branch; earlier rows are equal in all branches."""
    rows = {"last": 1, "post_image": tail_rows, "all": total}
    edits = [transform for transform in transforms if transform is not None]
    everywhere = [any(overrides(edit, stage) for stage in STREAM_STAGES) for edit in edits]
    row_counts = [total if all_rows else rows[edit.rows] for edit, all_rows in zip(edits, everywhere, strict=True)]
    if method is not None and method.positions(*jnp.zeros((3,), jnp.int32)) is not None:
        row_counts.append(tail_rows)
    return max(row_counts, default=0 if len(transforms) == 1 else 1)


def apply(params: dict, config: FamilyConfig, function: str, *arguments: Any, **options: Any) -> Any:
    """Calls a function of the module of `config`, in the dtype of the parameters."""
    dtype = params["language_model"]["embed_tokens"]["embedding"].dtype
    return models.build(config, dtype).apply({"params": params}, *arguments, method=function, **options)
