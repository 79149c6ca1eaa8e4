"""What the branches of a generation read: image towers run, prompts of contrast branches made, methods primed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lvlm_jax import parallel
from lvlm_jax.attention import Tap, Tapped
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import drivers
from lvlm_jax.generation.state import Prompt
from lvlm_jax.methods import Method
from lvlm_jax.methods.base import OTHER_PICTURES, contrast_kind
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors.layout import Inputs, bucket


def embedded(params: dict, config: FamilyConfig, prompt: Inputs, mesh: Mesh | None = None) -> Prompt:
    """What the decoder reads of a prompt; each device of a mesh looks at its part of the images."""
    tokens, image_tokens = prompt.tokens, prompt.image_tokens
    tokens, pixels, geometry = parallel.spread((tokens, prompt.pixels, prompt.geometry), mesh)
    if image_tokens is None and pixels is not None:
        image_tokens = drivers.encode_images(params, config, pixels, geometry)
    embeddings = drivers.embed(params, config, tokens, image_tokens)
    image_id, axes = jax.tree.map(jnp.asarray, (prompt.image_id, prompt.axes))
    return parallel.spread(Prompt(embeddings, image_id, axes), mesh)


def full_forward(
    params: dict,
    config: FamilyConfig,
    prompt: Inputs,
    method: Method | None,
    tap: Tap,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, Tapped]:
    """`forward.full_forward` of a prompt, the method primed for it."""
    return drivers.full_forward(
        params,
        config,
        embedded(params, config, prompt, mesh),
        primed(params, config, prompt, method, mesh),
        window=prompt.window,
        image_count=prompt.image_count,
        tap=tap,
    )


def primed(
    params: dict, config: FamilyConfig, prompt: Inputs, method: Method | None, mesh: Mesh | None = None
) -> Method | None:
    """The method, ready for a prompt, in buffers of its own: steps donate theirs with the state."""
    if method is None:
        return None
    if method.primes:
        tap = Tap(hidden=tuple(range(config.text.num_layers + 1)))
        states = [
            full_forward(params, config, version, None, tap, mesh)[1].hidden[:, 0, :, -1]
            for version in (prompt, prompt.without_images(config.pad_token_id))
        ]
        # Without an image both prompts are the same, however differently they are padded.
        image = (prompt.image_id > 0).any(axis=1)[None, :, None]
        method = method.primed(states[0], jnp.where(image, states[1], states[0]))
    return jax.tree.map(jnp.copy, method)


def contrast(
    params: dict,
    config: FamilyConfig,
    tokenizer: Callable[[], Any],
    prompt: Inputs,
    main: Prompt,
    method: Method | None,
    room: int,
    mesh: Mesh | None = None,
) -> tuple[Prompt | None, int]:
    """The contrast branch's prompt where it is not the main one's, and the capacity where its layout is not.

    Args:
        tokenizer: gives the tokenizer of the words, should they have to be encoded.
        main: the main branch's prompt, made of `prompt`.
        room: how many tokens must fit behind it.
        mesh: the devices, where there are several.

    Raises:
        LVLMError: the prompt exceeds the context.
    """
    kind = contrast_kind(method)
    if kind == "same":
        return None, 0
    if kind in OTHER_PICTURES:
        if prompt.pixels is None:
            return main, 0
        if kind == "pixels":
            pixels = drivers.contrast_pixels(method, prompt.pixels, jnp.asarray(prompt.image_index))
        else:
            pixels = config.shown(prompt.pictures, method.contrast_picture)
        other = dataclasses.replace(prompt, pixels=pixels, image_tokens=None)
        return embedded(params, config, other, mesh), 0
    if kind == "no_image":
        other = prompt.without_images(config.pad_token_id)
    else:
        words, start = method.contrast_words(), config.bos_token_id
        if isinstance(words, str):
            encoder = tokenizer()
            words = encoder(words, add_special_tokens=False)["input_ids"]
            start = encoder.bos_token_id if start < 0 else start
        if config.reads_instruction:  # the instruction that images are read with is disturbed
            geometry = config.instructed(prompt.geometry, words)
            other = dataclasses.replace(prompt, geometry=geometry, image_tokens=None)
        else:
            other = prompt.with_words(words, start, config.pad_token_id)
    longest, context = int(other.lengths.max()), config.text.max_position_embeddings
    if longest >= context:
        raise LVLMError(
            f"the contrast branch's prompt has {longest} tokens and the model's context is {context}; "
            "shorten the prompt"
        )
    return embedded(params, config, other, mesh), bucket(other.tokens.shape[1] + room)
