"""What the branches of a generation read: image towers run, prompts of contrast branches made, warm-up passes done."""

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
from lvlm_jax.generation import drivers
from lvlm_jax.generation.forward import NOTHING, uses_window
from lvlm_jax.generation.host import ALONE, Host
from lvlm_jax.generation.settings import whole
from lvlm_jax.generation.state import Prompt, State, Step
from lvlm_jax.methods import Method
from lvlm_jax.methods.base import OTHER_TOKENS, WarmUp, contrast_kind
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors.inputs import EncodedImage
from lvlm_jax.processors.layout import SMALLEST_WINDOW, Inputs, bucket

DEFAULT_CAPACITY = 128  # tokens behind a prompt, where no length is given


class Opening(NamedTuple):
    """What a prefill reads, and the columns of its caches.

    Attributes:
        main: the main branch's prompt.
        contrast: the contrast branch's, where it is not the main one's.
        method: the method, its warm-up pass done.
        options: static options of `forward.prefill`.
    """

    main: Prompt
    contrast: Prompt | None
    method: Method | None
    options: dict[str, Any]


def opening(
    params: dict, config: FamilyConfig, prompt: Inputs, method: Method | None, answer_capacity: int, host: Host = ALONE
) -> Opening:
    """Everything before the prefill of a prompt: towers, the contrast branch's prompt, warm-up pass.

    Args:
        answer_capacity: how many tokens must fit behind the prompt.

    Raises:
        LVLMError: the contrast branch's prompt exceeds the context.
    """
    main = embedded(params, config, prompt, host.mesh)
    (ready,) = warmed_up(params, config, prompt, main, [method], host.mesh)
    reads = contrast_inputs(config, prompt, method, host)
    options = prefill_options(prompt, answer_capacity, reads, method)
    if reads is None:
        return Opening(main, None, ready, options)
    if contrast_kind(method) == "tokens":
        return Opening(main, drivers.contrast_tokens(ready, main), ready, options)
    if contrast_kind(method) == "fewer_tokens":
        return Opening(main, with_fewer_tokens(params, config, prompt, main, ready), ready, options)
    contrast = main if reads is prompt else embedded(params, config, reads, host.mesh)
    return Opening(main, contrast, ready, options)


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
    """`forward.prefill` of a prompt behind its `opening`."""
    arguments, options = prefill_arguments(params, config, prompt, method, answer_capacity, host)
    with parallel.ambient(host.mesh):
        return drivers.prefill(*arguments, **options, share_prefix=share_prefix, tap=tap)


def prefill_arguments(
    params: dict, config: FamilyConfig, prompt: Inputs, method: Method | None, answer_capacity: int, host: Host = ALONE
) -> tuple[tuple, dict[str, Any]]:
    """Positional arguments and options of `forward.prefill` behind the `opening` of a prompt."""
    reads = opening(params, config, prompt, method, answer_capacity, host)
    return (params, config, reads.main, reads.method), {"contrast": reads.contrast} | reads.options


def answer_capacity(prompt: Inputs, max_length: int | None) -> int:
    """How many tokens fit behind a prompt if its longest sample may grow to `max_length`; `DEFAULT_CAPACITY` for None.

    Raises:
        LVLMError: fewer than the prompt has, or no number.
    """
    if max_length is None:
        return DEFAULT_CAPACITY
    longest = int(prompt.lengths.max())
    max_length = whole("max_length", max_length, low=1)
    if max_length < longest:
        raise LVLMError(f"max_length is {max_length} and the prompt has {longest} tokens; give at least that many")
    return max_length - longest


def prefill_options(
    prompt: Inputs, answer_capacity: int, reads: Inputs | None = None, method: Method | None = None
) -> dict[str, Any]:
    """Static options of `forward.prefill`.

    Args:
        answer_capacity: how many tokens must fit behind the prompt.
        reads: what the contrast branch of `method` reads, where that is not `prompt`.
    """
    apart = reads is not None and contrast_kind(method) not in OTHER_TOKENS
    return {
        "window": _window(prompt, method),
        "capacity": bucket(prompt.tokens.shape[1] + answer_capacity),
        "contrast_capacity": bucket(reads.tokens.shape[1] + answer_capacity) if apart else 0,
        "image_count": prompt.image_count,
    }


def _window(prompt: Inputs, method: Method | None) -> int:
    return prompt.window if uses_window(method) else SMALLEST_WINDOW


def embedded(params: dict, config: FamilyConfig, prompt: Inputs, mesh: Mesh | None = None) -> Prompt:
    """What the decoder reads of a prompt; each device of a mesh looks at its part of the images."""
    tokens, image_tokens = prompt.tokens, prompt.image_tokens
    tokens, pixels, geometry = parallel.spread((tokens, prompt.pixels, prompt.geometry), mesh)
    if image_tokens is None and pixels is not None:
        image_tokens = drivers.encode_images(params, config, pixels, geometry)
    embeddings = drivers.embed(params, config, tokens, image_tokens)
    image_id, axes = jax.tree.map(jnp.asarray, (prompt.image_id, prompt.axes))
    return parallel.spread(Prompt(embeddings, image_id, axes), mesh)


def encode_images(
    params: dict, config: FamilyConfig, pixels: Float[np.ndarray, "I 3 Y X"], mesh: Mesh | None = None
) -> list[EncodedImage]:
    """Runs the tower over images, for use in several prompts."""
    tokens = drivers.encode_images(params, config, parallel.spread(pixels, mesh))
    pairs = zip(pixels, np.asarray(parallel.local(tokens)), strict=True)
    return [EncodedImage(*pair) for pair in pairs]


def full_forward(
    params: dict, config: FamilyConfig, prompt: Inputs, method: Method | None, tap: Tap, mesh: Mesh | None = None
) -> tuple[jax.Array, Tapped]:
    """`forward.full_forward` of a prompt, after the method's warm-up pass."""
    main = embedded(params, config, prompt, mesh)
    (ready,) = warmed_up(params, config, prompt, main, [method], mesh)
    with parallel.ambient(mesh):
        return _full_forward(params, config, prompt, main, ready, tap)


def logits(
    params: dict, config: FamilyConfig, prompt: Inputs, method: Method | None = None, mesh: Mesh | None = None
) -> Float[Array, "B U V"]:
    """Logits in the columns of the arrays that a prompt was made of, of the main branch of `method`."""
    laid_out, _ = full_forward(params, config, prompt, method, NOTHING, mesh)
    return jnp.take_along_axis(laid_out, prompt.source_columns[..., None], axis=1)


def _full_forward(
    params: dict, config: FamilyConfig, prompt: Inputs, main: Prompt, method: Method | None, tap: Tap
) -> tuple[jax.Array, Tapped]:
    static = {"window": _window(prompt, method), "image_count": prompt.image_count, "tap": tap}
    return drivers.full_forward(params, config, main, method, **static)


def warmed_up(
    params: dict,
    config: FamilyConfig,
    prompt: Inputs,
    main: Prompt,
    methods: Sequence[Method | None],
    mesh: Mesh | None = None,
) -> list[Method | None]:
    """Methods ready for a prompt, in buffers of their own: steps donate theirs with the state.

    The warm-up pass is run once for all of them, and only if one asks for it.

    Args:
        main: what the decoder reads of the prompt.
    """
    methods = list(methods)
    wanted = {name for method in methods if method is not None for name in method.warm_up_fields}
    if wanted:
        found = seen(params, config, prompt, main, wanted, mesh)
        both = with_and_without(params, config, prompt, main, mesh) if "probe" in wanted else None
        for place, method in enumerate(methods):
            if method is not None and "tower" in method.warm_up_fields:
                found = found._replace(tower=through_edited_tower(params, config, prompt, main, method, mesh))
            if both is not None:  # an edited pass, so each setting has its own
                probed = drivers.probed(params, config, both, method.probe(), prompt.image_count)
                found = found._replace(probe=probed)
            methods[place] = method and method.after_warm_up(found)
    return jax.tree.map(jnp.copy, methods)


def seen(
    params: dict, config: FamilyConfig, prompt: Inputs, main: Prompt, wanted: Collection[str], mesh: Mesh | None = None
) -> WarmUp:
    """What the plain warm-up passes see of a prompt; a `probe` is the method's own, and not among it."""
    hidden = _last_hidden_states(params, config, prompt, main, mesh) if "hidden" in wanted else None
    return WarmUp(hidden, _last_row(params, config, prompt, main) if "attention" in wanted else None)


def _last_row(params: dict, config: FamilyConfig, prompt: Inputs, main: Prompt) -> Float[Array, "L B T"]:
    """Attention weights of the last prompt row, averaged over heads."""
    static = {"window": prompt.window, "image_count": prompt.image_count, "tap": Tap(layers=None, mean_heads=True)}
    return drivers.tapped_forward(params, config, main, None, **static).attention[:, 0, :, 0, 0]


def through_edited_tower(
    params: dict, config: FamilyConfig, prompt: Inputs, main: Prompt, method: Method, mesh: Mesh | None = None
) -> Float[Array, "B T E"]:
    """What the decoder reads of a prompt when the tower has the edit of a method."""
    if prompt.pixels is None:
        return main.embeddings
    pixels, geometry = parallel.spread((prompt.pixels, prompt.geometry), mesh)
    tokens = drivers.encode_edited(params, config, pixels, method, geometry)
    return embedded(params, config, dataclasses.replace(prompt, image_tokens=tokens), mesh).embeddings


def with_and_without(
    params: dict, config: FamilyConfig, prompt: Inputs, main: Prompt, mesh: Mesh | None = None
) -> Prompt:
    """The prompts with their images, then the same without them, in columns of one number."""
    bare = embedded(params, config, prompt.without_images(config.pad_token_id), mesh)
    more, wider = (main.image_id.shape[1] - bare.image_id.shape[1], main.embeddings.shape[2] - bare.embeddings.shape[2])
    image_id = jnp.pad(bare.image_id, ((0, 0), (more, 0)), constant_values=-1)
    embeddings = jnp.pad(bare.embeddings, ((0, 0), (more, 0), (0, wider)))
    axes = None
    if main.axes is not None:
        text = jnp.maximum(jnp.cumsum(image_id >= 0, axis=1) - 1, 0).astype(main.axes.dtype)
        axes = jnp.concatenate([main.axes, jnp.broadcast_to(text, main.axes.shape)], axis=1)
    return Prompt(jnp.concatenate([main.embeddings, embeddings]), jnp.concatenate([main.image_id, image_id]), axes)


def _last_hidden_states(
    params: dict, config: FamilyConfig, prompt: Inputs, main: Prompt, mesh: Mesh | None
) -> tuple[Float[Array, "L B E"], Float[Array, "L B E"]]:
    """All hidden states of the last prompt token, with images and without them."""
    tap = Tap(hidden=tuple(range(config.text.num_layers + 1)))
    bare = prompt.without_images(config.pad_token_id)
    versions = ((prompt, main), (bare, embedded(params, config, bare, mesh)))
    with_images, without_images = (
        drivers.tapped_forward(
            params, config, reads, None, window=version.window, image_count=version.image_count, tap=tap
        ).hidden[:, 0, :, -1]
        for version, reads in versions
    )
    # Without an image both prompts are the same, however differently they are padded.
    image = (prompt.image_id > 0).any(axis=1)[None, :, None]
    return with_images, jnp.where(image, without_images, with_images)


def with_fewer_tokens(params: dict, config: FamilyConfig, prompt: Inputs, main: Prompt, method: Method) -> Prompt:
    """What the contrast branch reads, for "fewer_tokens".

    Raises:
        LVLMError: the family's tower has no class token.
    """
    if prompt.pixels is None:
        return main
    ranked = drivers.salience(params, config, prompt.pixels, prompt.geometry)
    return drivers.with_fewer_tokens(method, main, ranked, prompt.image_count)


def contrast_inputs(config: FamilyConfig, prompt: Inputs, method: Method | None, host: Host = ALONE) -> Inputs | None:
    """The prompt that the contrast branch reads: None where it shares the main branch's.

    `prompt` itself where the branch reads other image tokens of the same pictures, or there are none.

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
            change = functools.partial(drivers.contrast_image, method)
            pixels = config.altered(prompt.pictures, prompt.picture_index, change)
        elif kind == "pixels":
            pixels = drivers.contrast_pixels(method, prompt.pixels, jnp.asarray(prompt.image_index))
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
        if config.reads_instruction:  # the instruction that images are read with is disturbed
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
