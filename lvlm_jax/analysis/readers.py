"""Taps a model while it writes a given answer, token by token, with the same prefill and decode steps as generation."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from lvlm_jax.analysis.heads import sink_density
from lvlm_jax.attention import Tap, Tapped
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation.replay import replay
from lvlm_jax.methods import Method
from lvlm_jax.processors.layout import Inputs

WEIGHTS_AT_ONCE = 2**28  # float32 attention weights that `head_sinks` keeps at once: 1 GiB


def follow(model, prompt: Any, tokens: Sequence[int], tap: Tap, method: Method | None = None) -> Iterator[Tapped]:
    """Yields the arrays that `tap` requests at each token of one answer: from the prompt, then from each decode step.

    Args:
        model: an `LVLM`.
        prompt: anything `LVLM.prepare` takes, one conversation.
        tokens: the answer, as in `Output.tokens`.
        tap: the request; with rows "all", the first item has all prompt rows.
        method: the method that the answer was generated with.

    Yields:
        The items of `generation.replay.replay`, for each of the T answer tokens.

    Raises:
        LVLMError: there is more than one conversation.
    """
    prompt = model.prepare(prompt)
    if prompt.batch != 1:
        raise LVLMError(f"one conversation can be followed at a time; {prompt.batch} were given")
    yield from replay(model.params, model.config, prompt, method, [tokens], tap, model.host)


def mean_attention(
    model, prompt: Any, tokens: Sequence[int], method: Method | None = None
) -> tuple[Float[np.ndarray, "L B S S"], Int[np.ndarray, "B S"]]:
    """Head-mean attention of every row of a prompt and its answer, and the kind of each row, for `information_flow`.

    The rows are exactly those of the generation: prompt rows from the prefill, the row of each answer token from its
    decode step, with all edits of the method's main branch. The last answer token has no row, because it was never an
    input.
    """
    prompt = model.prepare(prompt)
    total = prompt.tokens.shape[1]
    size = total + max(len(tokens) - 1, 0)
    tap = Tap(layers=None, rows="all", mean_heads=True)
    weights = np.zeros((model.config.text.num_layers, 1, size, size), np.float32)
    for index, tapped in enumerate(follow(model, prompt, tokens or [0], tap, method)):
        rows = np.asarray(tapped.attention[:, 0, :, 0])
        columns = min(rows.shape[-1], size)
        place = slice(0, total) if index == 0 else slice(total + index - 1, total + index)
        weights[:, :, place, :columns] = rows[..., :columns]
    image_id = np.pad(prompt.image_id, ((0, 0), (0, size - total)))
    return weights, image_id


def head_sinks(model, prompt: Any, beta: float, method: Method | None = None) -> Float[np.ndarray, "L B H"]:
    """`sink_density` of a prompt in every layer and head, a few layers at a time."""
    prompt = model.prepare(prompt)
    text = model.config.text
    per_layer = prompt.batch * text.num_heads * prompt.tokens.shape[1] ** 2
    at_once = max(1, WEIGHTS_AT_ONCE // per_layer)
    densities = []
    for start in range(0, text.num_layers, at_once):
        layers = tuple(range(start, min(start + at_once, text.num_layers)))
        attention = model.read(prompt, Tap(layers=layers, rows="all"), method).attention[:, 0]
        densities.append(np.asarray(sink_density(attention, jnp.asarray(prompt.image_id), beta)))
    return np.concatenate(densities)


def with_answer(model, prompt: Any, tokens: Sequence[int]) -> Inputs:
    """One conversation's prompt followed by its answer, for a single forward pass."""
    prompt = model.prepare(prompt)
    if prompt.batch != 1:
        raise LVLMError(f"one conversation can be given an answer at a time; {prompt.batch} were given")
    return prompt.with_answers([tokens] * prompt.batch, model.config.pad_token_id)
