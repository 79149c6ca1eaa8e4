"""Pure functions from parameters and a prompt to logits: full forward, prefill, decode step.

They know no model family: a module offers `encode_images`, `embed`, `decode`, `head` and `exit_logits`. The compute
dtype is that of the parameters. `config` is static, `window`, `capacity` and switches too.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lvlm_jax import models
from lvlm_jax.attention import Context, LayerCache, Tap, Tapped, Transform
from lvlm_jax.attention.attend import shifted
from lvlm_jax.attention.context import image_end
from lvlm_jax.attention.transform import STREAM_STAGES, overrides
from lvlm_jax.generation.state import Memory, Prompt, State, Step, Track
from lvlm_jax.methods import Method, Readout
from lvlm_jax.methods.base import OTHER_LAYOUTS, OTHER_TOKENS, contrast_kind
from lvlm_jax.models.config import DecoderConfig
from lvlm_jax.models.decoder import Decoded, shift_rotation
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.models.vision import with_edited_values

NOTHING = Tap()
STREAM_FROM = 256  # columns of a prompt from which attention goes by blocks; faster on a CPU from here on, too


def encode_images(
    params: dict, config: FamilyConfig, pixels: Float[Array, "R ..."], geometry: dict[str, Array] | None = None
) -> Float[Array, "*N E"]:
    """Image tokens as the decoder receives them; arguments as in `models.pictures.Pictures`."""
    return apply(params, config, "encode_images", pixels, **(geometry or {}))


def encode_edited(
    params: dict,
    config: FamilyConfig,
    pixels: Float[Array, "R ..."],
    method: Method,
    geometry: dict[str, Array] | None = None,
) -> Float[Array, "*N E"]:
    """`encode_images` by a tower with the edit of a method."""

    def edit(layer: int, values: Float[Array, "R P C"]) -> Float[Array, "R P C"]:
        valid = (geometry or {}).get("valid", jnp.ones(values.shape[:2], bool))
        return method.tower_values(layer, values, valid)

    return with_edited_values(lambda: encode_images(params, config, pixels, geometry), edit)


def salience(
    params: dict, config: FamilyConfig, pixels: Float[Array, "R ..."], geometry: dict[str, Array] | None = None
) -> Float[Array, "N"]:
    """How much the tower's class token looks at each image token, in reading order."""
    return apply(params, config, "salience", pixels, **(geometry or {}))


def with_fewer_tokens(method: Method, prompt: Prompt, salience: Float[Array, "N"], image_count: int) -> Prompt:
    """The prompt without the image tokens that the method leaves out; what stays moves to the right end."""
    image = prompt.image_id > 0
    order = jnp.cumsum(image.reshape(-1)).reshape(image.shape) - 1
    of_columns = jnp.where(image, salience[jnp.clip(order, 0, salience.shape[0] - 1)], 0)
    kept = method.keep_tokens(prompt.image_id, image_count, of_columns)
    columns = jnp.argsort(kept, axis=1, stable=True)  # those that are left out first
    image_id = jnp.take_along_axis(jnp.where(kept, prompt.image_id, -1), columns, axis=1)
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
    window: int,
    image_count: int = 1,
    tap: Tap = NOTHING,
) -> tuple[Float[Array, "B T V"], Tapped]:
    """Logits of every row in one pass without a cache, of the main branch when a method has several, and the tap."""
    transforms = transforms_of(method)[:1]
    rows = _explicit_rows(method, transforms, window, prompt.image_id.shape[1])
    context = prompt_context(prompt.image_id, method, rows, image_count, axes=prompt.axes)
    decoded = apply(params, config, "decode", prompt.embeddings[None], context, None, transforms, tap)
    logits = apply(params, config, "head", decoded.hidden[0])
    return logits, _with_exit_logits(params, config, decoded.tapped)


def probed(params: dict, config: FamilyConfig, prompt: Prompt, transform: Transform, image_count: int = 1) -> Any:
    """The carry that a transform has after the last layer of a prompt, all of whose rows it may edit."""
    context = prompt_context(prompt.image_id, None, prompt.image_id.shape[1], image_count, axes=prompt.axes)
    return apply(params, config, "decode", prompt.embeddings[None], context, None, (transform,)).carries[0]


def prefill(
    params: dict,
    config: FamilyConfig,
    prompt: Prompt,
    method: Method | None,
    window: int,
    capacity: int,
    contrast: Prompt | None = None,
    contrast_capacity: int = 0,
    image_count: int = 1,
    share_prefix: bool = True,
    tap: Tap = NOTHING,
    before: tuple[LayerCache, ...] | None = None,
) -> tuple[State, Step]:
    """Runs the prompt.

    With a contrast branch that reads the same prompt, rows that no branch edits are run once and their columns
    shared; the last rows are run for all branches together. Other pictures in the same places are one more row of
    the batch; a prompt of another layout is run by itself.

    Args:
        window: how many of the last rows hold all post-image rows (`Inputs.window`).
        capacity: columns of the caches, prompt included.
        contrast: what the contrast branch reads, if it is not `prompt`.
        contrast_capacity: columns of its caches, where its layout is another.
        image_count: no sample has more images.
        share_prefix: False runs the whole prompt for every branch.
        tap: what this step and later ones return besides logits.
        before: the `prefix` of the prompt, where it has run already; `prompt.embeddings` are then those of the rest,
            among which must be the `edited_rows`.
    """
    total = prompt.image_id.shape[1]
    transforms = transforms_of(method)
    kind = contrast_kind(method)
    apart = kind in OTHER_LAYOUTS
    together = transforms[:1] if apart else transforms
    rows = _explicit_rows(method, together, window, total)
    shared = len(together) > 1 and kind == "same" and share_prefix and tap.rows == "last"
    split = total - rows if shared else 0
    rest, caches = prompt.embeddings[None, :, split:], None
    if before is not None:
        split, caches, rest = before[0].prefix.length, before, prompt.embeddings[None]
    elif split:
        # Image tokens that see later ones need the rows behind the split too, where it may lie inside an image.
        end = total if config.text.whole_images else split
        caches = prefix(params, config, prompt, end, split, image_count)
    context = prompt_context(prompt.image_id, method, rows, image_count, split, prompt.axes)
    if kind in OTHER_TOKENS:
        further = [prompt.embeddings] * (len(together) - 2)
        branched = jnp.stack([prompt.embeddings, contrast.embeddings, *further])
    else:
        branched = jnp.broadcast_to(rest, (len(together), *rest.shape[1:]))
    asked = _with_method_exits(method, config, tap)
    decoded = apply(params, config, "decode", branched, context, caches, together, asked)
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
    """The first `split` columns of a prompt, of every layer, which all branches share.

    Args:
        end: rows that are run; more than `split` only where image tokens see later ones.
        split: columns to keep. No method edits their rows.
    """
    axes = None if prompt.axes is None else prompt.axes[:, :, :end]
    context = prompt_context(prompt.image_id[:, :end], None, 0, image_count, axes=axes)
    seen = apply(params, config, "decode", prompt.embeddings[None, :, :end], context).columns
    return tuple(LayerCache(columns.own[0].first(split), ()) for columns in seen)


def edited_rows(method: Method | None, window: int, total: int) -> int:
    """How many of the last of `total` prompt rows a method edits; all of them where a branch has its own prompt."""
    return total if contrast_kind(method) != "same" else _explicit_rows(method, transforms_of(method), window, total)


def decode_step(params: dict, config: FamilyConfig, state: State, tokens: Int[Array, "B"]) -> tuple[State, Step]:
    """Appends one token per sample and returns the logits of the next."""
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
        image_id: 0 text, k >= 1 the k-th image, -1 padding.
        method: whose positions stage moves image tokens; None moves none.
        explicit_rows: how many of the last rows the method's stages see.
        image_count: no sample has more images.
        first_row: the column of the first row.
        axes: positions along every axis, where the model counts along several.
    """
    valid, image = image_id >= 0, image_id > 0
    positions = jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0) if axes is None else axes[0]
    shift = None
    if method is not None:
        # Text moves every axis on by one, so what is left of a position is what images have added to it: their
        # tokens on the one ordinary axis; on several the extents of earlier images and the place inside its own.
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
    """The tap with the hidden states added that the method's early exits need, behind those of the caller."""
    depth = config.text.num_layers
    return tap if method is None else dataclasses.replace(tap, exits=tap.exits + method.exits(depth))


def _with_exit_logits(params: dict, config: FamilyConfig, tapped: Tapped) -> Tapped:
    """Hidden states of the caller's early exits turned into logits."""
    if tapped.exits is None:
        return tapped
    return tapped._replace(exits=apply(params, config, "exit_logits", tapped.exits, True))


def _finish(
    params: dict, config: FamilyConfig, state: State, last: Float[Array, "N B E"], decoded: Decoded
) -> tuple[State, Step]:
    """Head on the last row, early exits, then the method's combination of branches."""
    logits = apply(params, config, "head", last)
    main, contrast = logits[0], logits[1] if logits.shape[0] > 1 else None
    combined, memory, tapped = main, state.memory, decoded.tapped
    if state.method is not None:
        exits, asked = tapped.exits, len(state.tap.exits)
        if exits is not None:
            tapped = tapped._replace(exits=exits[:asked] if asked else None)
            exits = exits[asked:, 0] if exits.shape[0] > asked else None
        if exits is not None:
            exits = apply(params, config, "exit_logits", exits, state.method.exit_norm)
        others = logits[2:] if logits.shape[0] > 2 else None
        readout = Readout(main, contrast, exits, decoded.carries[0], others)
        combined, kept = state.method.combine(readout, memory.logits)
        memory = Memory(kept, state.method.remember(decoded.carries[0], memory.edits))
    tapped = _with_exit_logits(params, config, tapped)
    return dataclasses.replace(state, memory=memory), Step(main, contrast, combined, tapped)


def _cache(columns: LayerCache, config: DecoderConfig, layer: int, context: Context, capacity: int) -> LayerCache:
    """Fresh prompt columns as a decode cache: image keys calibrated, own blocks padded to the capacity."""
    if context.image_shift is not None:
        # Every later row comes after the images, so none needs the ordinary image keys again.
        rope = config.layer_rope(layer)
        columns = shifted(columns, shift_rotation(rope, config.head_dim, context.image_shift))
    own = capacity - (columns.prefix.length if columns.prefix else 0)
    return LayerCache(columns.prefix, tuple(block.padded(own) for block in columns.own))


def transforms_of(method: Method | None) -> tuple[Transform | None, ...]:
    """The attention edits of each branch."""
    return (None,) if method is None else method.branches()


def uses_window(method: Method | None) -> bool:
    """Whether `window` decides on anything; where it does not, one program serves prompts with all of them."""
    return method is not None and _uses_window(jax.tree.structure(method))


@functools.lru_cache(maxsize=64)
def _uses_window(structure: jax.tree_util.PyTreeDef) -> bool:
    """Strengths decide on nothing here, and would be computed with at every call."""
    method = jax.tree.unflatten(structure, [1.0] * structure.num_leaves)
    return _explicit_rows(method, transforms_of(method), 2, 4) == 2


def _explicit_rows(method: Method | None, transforms: tuple[Transform | None, ...], window: int, total: int) -> int:
    """How many of the last prompt rows the method can change in any branch; rows before them are all alike."""
    rows = {"last": 1, "post_image": window, "all": total}
    edits = [transform for transform in transforms if transform is not None]
    everywhere = [any(overrides(edit, stage) for stage in STREAM_STAGES) for edit in edits]
    needed = [total if all_rows else rows[edit.rows] for edit, all_rows in zip(edits, everywhere, strict=True)]
    if method is not None and method.positions(*jnp.zeros((3,), jnp.int32)) is not None:
        needed.append(window)
    return max(needed, default=0 if len(transforms) == 1 else 1)


def apply(params: dict, config: FamilyConfig, function: str, *arguments: Any, **options: Any) -> Any:
    """A function of the module of `config`, in the dtype of the parameters."""
    dtype = params["language_model"]["embed_tokens"]["embedding"].dtype
    return models.build(config, dtype).apply({"params": params}, *arguments, method=function, **options)
