"""Prepares the inputs of all branches: runs image towers, makes contrast prompts, runs warm-up passes."""

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from lvlm_jax import parallel
from lvlm_jax.attention import Tap, Tapped
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import chunks, decode_loop, prefixes
from lvlm_jax.generation.forward import NOTHING, edited_rows, uses_tail_rows
from lvlm_jax.generation.host import ALONE, Host
from lvlm_jax.generation.settings import whole_number
from lvlm_jax.generation.state import Prompt, State, Step
from lvlm_jax.methods import Method
from lvlm_jax.methods.base import OTHER_TOKENS, WarmUp, contrast_kind
from lvlm_jax.methods.tower import TowerEdit
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors.inputs import EncodedImage
from lvlm_jax.processors.layout import FEWEST_TAIL_ROWS, Inputs, bucket

DEFAULT_CAPACITY = 128  # tokens after a prompt, if no length is given


class PrefillInputs(NamedTuple):
    """The inputs and options of a prefill.

    Attributes:
        main: the main branch's prompt.
        contrast: the contrast branch's prompt, if it is another one.
        method: the method after its warm-up pass.
        options: static options of `forward.prefill`.
    """

    main: Prompt
    contrast: Prompt | None
    method: Method | None
    options: dict[str, Any]


def prefill_inputs(
    params: dict, config: FamilyConfig, prompt: Inputs, method: Method | None, answer_capacity: int, host: Host = ALONE
) -> PrefillInputs:
    """Does everything that precedes the prefill: towers, the contrast branch's prompt, the warm-up pass.

    Args:
        answer_capacity: how many tokens must fit after the prompt.

    Raises:
        LVLMError: the contrast branch's prompt exceeds the context.
    """
    main = embed_prompt(params, config, prompt, host.mesh, tower_edit(method))
    (ready,) = after_warm_up(params, config, prompt, main, [method], host.mesh)
    contrast_prompt = make_contrast_prompt(config, prompt, method, host)
    options = prefill_options(prompt, answer_capacity, contrast_prompt, method)
    if contrast_prompt is None:
        return PrefillInputs(main, None, ready, options)
    if contrast_kind(method) == "tokens":
        return PrefillInputs(main, decode_loop.contrast_tokens(ready, main), ready, options)
    if contrast_kind(method) == "fewer_tokens":
        return PrefillInputs(main, with_fewer_tokens(params, config, prompt, main, ready), ready, options)
    contrast = main if contrast_prompt is prompt else embed_prompt(params, config, contrast_prompt, host.mesh)
    return PrefillInputs(main, contrast, ready, options)


def prefill(
    params: dict,
    config: FamilyConfig,
    prompt: Inputs,
    method: Method | None,
    answer_capacity: int,
    host: Host = ALONE,
    share_prefix: bool = True,
    tap: Tap = NOTHING,
) -> tuple[State, Step]:
    """`prefill_inputs`, then `forward.prefill`, in chunks if the prompts are very long."""
    work = begin_prefill(params, config, prompt, method, answer_capacity, host, None, share_prefix, tap)
    with parallel.ambient(host.mesh):
        return work.finish()


def begin_prefill(
    params: dict,
    config: FamilyConfig,
    prompt: Inputs,
    method: Method | None,
    answer_capacity: int,
    host: Host = ALONE,
    rows: int | None = None,
    share_prefix: bool = True,
    tap: Tap = NOTHING,
    recent: prefixes.Recent | None = None,
) -> chunks.Prefill:
    """Runs `prefill_inputs`, and returns a prefill that advances step by step.

    The common beginning of samples (`prefixes`) runs once.

    Args:
        rows: how many rows of the prompt are run at a time; None for as many as `chunks.MOST` allows.
        recent: a memory of the previous prompt's beginning; used only for a batch of one.
    """
    inputs = prefill_inputs(params, config, prompt, method, answer_capacity, host)
    options = inputs.options | {"share_prefix": share_prefix, "tap": tap}
    model, prefill_arguments = (params, config, inputs.main), (inputs.method, inputs.contrast, options)
    if not share_prefix or tap.rows == "all":
        return chunks.Prefill(*model, *prefill_arguments)
    rows = rows or max(1, chunks.MOST // prompt.batch)
    edited = max(1, edited_rows(inputs.method, options["tail_rows"], prompt.tokens.shape[1]))
    if prefixes.shares(config, inputs.method):
        before = prefixes.before(*model, prompt, edited, rows, recent)
        if before is not None:
            return chunks.Prefill(*model, *prefill_arguments, before)
    longest = int(prompt.lengths.max())
    if longest <= rows:
        return chunks.Prefill(*model, *prefill_arguments)
    if reason := chunks.obstacle(config, inputs.method):
        chunks.say(reason)
        return chunks.Prefill(*model, *prefill_arguments)
    total = prompt.tokens.shape[1]
    before = chunks.prefix(*model, total - edited, total - longest, rows, prompt.image_count)
    return chunks.Prefill(*model, *prefill_arguments, before)


def prefill_arguments(
    params: dict, config: FamilyConfig, prompt: Inputs, method: Method | None, answer_capacity: int, host: Host = ALONE
) -> tuple[tuple, dict[str, Any]]:
    """Positional arguments and options of `forward.prefill` for a prompt."""
    inputs = prefill_inputs(params, config, prompt, method, answer_capacity, host)
    return (params, config, inputs.main, inputs.method), {"contrast": inputs.contrast} | inputs.options


def answer_capacity(prompt: Inputs, max_length: int | None) -> int:
    """How many tokens fit after a prompt if its longest sample may grow to `max_length`; `DEFAULT_CAPACITY` for None.

    Raises:
        LVLMError: `max_length` is less than the prompt's length, or not a number.
    """
    if max_length is None:
        return DEFAULT_CAPACITY
    longest = int(prompt.lengths.max())
    max_length = whole_number("max_length", max_length, low=1)
    if max_length < longest:
        raise LVLMError(f"max_length is {max_length} and the prompt has {longest} tokens; give at least {longest}")
    return max_length - longest


def prefill_options(
    prompt: Inputs, answer_capacity: int, reads: Inputs | None = None, method: Method | None = None
) -> dict[str, Any]:
    """Static options of `forward.prefill`.

    Args:
        answer_capacity: how many tokens must fit after the prompt.
        reads: the prompt of the contrast branch, if it has its own; None if the branches share `prompt`.
    """
    apart = reads is not None and contrast_kind(method) not in OTHER_TOKENS
    return {
        "tail_rows": _tail_rows(prompt, method),
        "capacity": bucket(prompt.tokens.shape[1] + answer_capacity),
        "contrast_capacity": bucket(reads.tokens.shape[1] + answer_capacity) if apart else 0,
        "image_count": prompt.image_count,
    }


def _tail_rows(prompt: Inputs, method: Method | None) -> int:
    return prompt.tail_rows if uses_tail_rows(method) else FEWEST_TAIL_ROWS


def tower_edit(method: Method | None) -> TowerEdit | None:
    """The method's edit of the vision tower; None without a method, or if it leaves the tower plain."""
    return None if method is None else method.tower_edit()


def embed_prompt(
    params: dict, config: FamilyConfig, prompt: Inputs, mesh: Mesh | None = None, edit: TowerEdit | None = None
) -> Prompt:
    """The decoder's input for a prompt; each device of a mesh runs the tower on its part of the images.

    Args:
        edit: the edit of the tower. With one, image tokens that the prompt already has are not used: they are the plain
            tower's.
    """
    tokens, image_tokens = prompt.tokens, prompt.image_tokens
    tokens, pixels, geometry = parallel.spread((tokens, prompt.pixels, prompt.geometry), mesh)
    if pixels is not None and (image_tokens is None or edit is not None):
        image_tokens = decode_loop.encode_images(params, config, pixels, geometry, edit)
    embeddings = decode_loop.embed(params, config, tokens, image_tokens)
    image_id, axes = jax.tree.map(jnp.asarray, (prompt.image_id, prompt.axes))
    return parallel.spread(Prompt(embeddings, image_id, axes), mesh)


def encode_images(
    params: dict, config: FamilyConfig, pixels: Float[np.ndarray, "I 3 Y X"], mesh: Mesh | None = None
) -> list[EncodedImage]:
    """Runs the tower over images, for use in several prompts."""
    tokens = decode_loop.encode_images(params, config, parallel.spread(pixels, mesh))
    pairs = zip(pixels, np.asarray(parallel.local(tokens)), strict=True)
    return [EncodedImage(*pair) for pair in pairs]


def full_forward(
    params: dict, config: FamilyConfig, prompt: Inputs, method: Method | None, tap: Tap, mesh: Mesh | None = None
) -> tuple[jax.Array, Tapped]:
    """`forward.full_forward` of a prompt, after the method's warm-up pass."""
    main = embed_prompt(params, config, prompt, mesh, tower_edit(method))
    (ready,) = after_warm_up(params, config, prompt, main, [method], mesh)
    with parallel.ambient(mesh):
        return _full_forward(params, config, prompt, main, ready, tap)


def logits(
    params: dict, config: FamilyConfig, prompt: Inputs, method: Method | None = None, mesh: Mesh | None = None
) -> Float[Array, "B U V"]:
    """Logits of the main branch of `method`, one row for each column of the arrays that became the prompt."""
    laid_out, _ = full_forward(params, config, prompt, method, NOTHING, mesh)
    return jnp.take_along_axis(laid_out, prompt.source_columns[..., None], axis=1)


def _full_forward(
    params: dict, config: FamilyConfig, prompt: Inputs, main: Prompt, method: Method | None, tap: Tap
) -> tuple[jax.Array, Tapped]:
    static = {"tail_rows": _tail_rows(prompt, method), "image_count": prompt.image_count, "tap": tap}
    return decode_loop.full_forward(params, config, main, method, **static)


def after_warm_up(
    params: dict,
    config: FamilyConfig,
    prompt: Inputs,
    main: Prompt,
    methods: Sequence[Method | None],
    mesh: Mesh | None = None,
) -> list[Method | None]:
    """Runs the warm-up pass of several methods; the results have their own buffers, because decode steps donate them.

    The warm-up pass runs once for all methods, and only if one of them needs it.

    Args:
        main: the decoder's input for the prompt.
    """
    methods = list(methods)
    fields = {name for method in methods if method is not None for name in method.warm_up_fields}
    if fields:
        results = warm_up_results(params, config, prompt, main, fields, mesh)
        pairs = with_and_without_images(params, config, prompt, main, mesh) if "probe" in fields else None
        for place, method in enumerate(methods):
            if method is not None and "tower" in method.warm_up_fields:
                results = results._replace(tower=embed_with_edited_tower(params, config, prompt, main, method, mesh))
            if pairs is not None:  # the probe edits the pass, so each method runs its own pass
                probed = decode_loop.probe(params, config, pairs, method.probe(), prompt.image_count)
                results = results._replace(probe=probed)
            methods[place] = method and method.after_warm_up(results)
    return jax.tree.map(jnp.copy, methods)


def warm_up_results(
    params: dict, config: FamilyConfig, prompt: Inputs, main: Prompt, fields: Collection[str], mesh: Mesh | None = None
) -> WarmUp:
    """Runs the plain warm-up passes; the fields `tower` and `probe` depend on the method and are left out."""
    hidden = _last_hidden_states(params, config, prompt, main, mesh) if "hidden" in fields else None
    return WarmUp(hidden, _last_row_attention(params, config, prompt, main) if "attention" in fields else None)


def _last_row_attention(params: dict, config: FamilyConfig, prompt: Inputs, main: Prompt) -> Float[Array, "L B T"]:
    """Attention weights of the last prompt row, averaged over heads."""
    static = {
        "tail_rows": prompt.tail_rows,
        "image_count": prompt.image_count,
        "tap": Tap(layers=None, mean_heads=True),
    }
    return decode_loop.tapped_forward(params, config, main, None, **static).attention[:, 0, :, 0, 0]


def embed_with_edited_tower(
    params: dict, config: FamilyConfig, prompt: Inputs, main: Prompt, method: Method, mesh: Mesh | None = None
) -> Float[Array, "B T E"]:
    """The decoder's input for a prompt if the tower runs with the `tower_values` of a method."""
    if prompt.pixels is None:
        return main.embeddings
    pixels, geometry = parallel.spread((prompt.pixels, prompt.geometry), mesh)
    tokens = decode_loop.encode_edited(params, config, pixels, method, geometry)
    return embed_prompt(params, config, dataclasses.replace(prompt, image_tokens=tokens), mesh).embeddings


def with_and_without_images(
    params: dict, config: FamilyConfig, prompt: Inputs, main: Prompt, mesh: Mesh | None = None
) -> Prompt:
    """The prompts with their images, followed by the same prompts without images, padded to equal size."""
    bare = embed_prompt(params, config, prompt.without_images(config.pad_token_id), mesh)
    missing_columns = main.image_id.shape[1] - bare.image_id.shape[1]
    missing_channels = main.embeddings.shape[2] - bare.embeddings.shape[2]
    image_id = jnp.pad(bare.image_id, ((0, 0), (missing_columns, 0)), constant_values=-1)
    embeddings = jnp.pad(bare.embeddings, ((0, 0), (missing_columns, 0), (0, missing_channels)))
    axes = None
    if main.axes is not None:
        text = jnp.maximum(jnp.cumsum(image_id >= 0, axis=1) - 1, 0).astype(main.axes.dtype)
        axes = jnp.concatenate([main.axes, jnp.broadcast_to(text, main.axes.shape)], axis=1)
    return Prompt(jnp.concatenate([main.embeddings, embeddings]), jnp.concatenate([main.image_id, image_id]), axes)


def _last_hidden_states(
    params: dict, config: FamilyConfig, prompt: Inputs, main: Prompt, mesh: Mesh | None
) -> tuple[Float[Array, "L B E"], Float[Array, "L B E"]]:
    """All hidden states of the last prompt token, with and without images."""
    tap = Tap(hidden=tuple(range(config.text.num_layers + 1)))
    bare = prompt.without_images(config.pad_token_id)
    versions = ((prompt, main), (bare, embed_prompt(params, config, bare, mesh)))
    with_images, without_images = (
        decode_loop.tapped_forward(
            params, config, inputs, None, tail_rows=version.tail_rows, image_count=version.image_count, tap=tap
        ).hidden[:, 0, :, -1]
        for version, inputs in versions
    )
    # Without an image both prompts are equal, but padding may differ.
    image = (prompt.image_id > 0).any(axis=1)[None, :, None]
    return with_images, jnp.where(image, without_images, with_images)


def with_fewer_tokens(params: dict, config: FamilyConfig, prompt: Inputs, main: Prompt, method: Method) -> Prompt:
    """The contrast branch's input if it leaves image tokens out ("fewer_tokens").

    Raises:
        LVLMError: the family's tower has no class token.
    """
    if prompt.pixels is None:
        return main
    ranked = decode_loop.salience(params, config, prompt.pixels, prompt.geometry)
    return decode_loop.with_fewer_tokens(method, main, ranked, prompt.image_count)


def make_contrast_prompt(
    config: FamilyConfig, prompt: Inputs, method: Method | None, host: Host = ALONE
) -> Inputs | None:
    """The prompt of the contrast branch, or None if it shares the main branch's prompt.

    Returns `prompt` itself if the branch reads other image tokens of the same images, or if there are no images.

    Raises:
        LVLMError: the prompt exceeds the context.
    """
    kind = contrast_kind(method)
    if kind == "same":
        return None
    if kind in (*OTHER_TOKENS, "fewer_tokens"):
        if prompt.pixels is None or kind in ("tokens", "fewer_tokens"):
            return prompt
        if kind == "altered":
            change = functools.partial(decode_loop.contrast_image, method)
            pixels = config.altered(prompt.pictures, prompt.picture_index, change)
        elif kind == "pixels":
            pixels = decode_loop.contrast_pixels(method, prompt.pixels, jnp.asarray(prompt.image_index))
        else:
            pixels = config.shown(prompt.pictures, method.contrast_picture)
        return dataclasses.replace(prompt, pixels=pixels, image_tokens=None)
    if kind == "no_image":
        other = prompt.without_images(config.pad_token_id)
    else:
        words, start = method.contrast_words(), config.bos_token_id
        if isinstance(words, str):
            encoder = host.words_tokenizer()
            words = encoder(words, add_special_tokens=False)["input_ids"]
            start = encoder.bos_token_id if start < 0 else start
        if config.reads_instruction:  # the tower also reads the instruction, so the words go there
            geometry = config.instructed(prompt.geometry, words, method.keeps_instruction())
            other = dataclasses.replace(prompt, geometry=geometry, image_tokens=None)
        else:
            other = prompt.with_words(words, start, config.pad_token_id)
    longest, context = int(other.lengths.max()), config.text.max_position_embeddings
    if longest >= context:
        raise LVLMError(
            f"the contrast branch's prompt has {longest} tokens and the model's context is {context}; "
            "shorten the prompt"
        )
    return other
