"""Runs given answers token by token, as decoding does, and yields tapped arrays."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lvlm_jax import parallel
from lvlm_jax.attention import Tap, Tapped
from lvlm_jax.errors import LVLMError, shown
from lvlm_jax.generation import branches, decode_loop
from lvlm_jax.generation.host import ALONE, Host
from lvlm_jax.generation.settings import LARGEST_INT
from lvlm_jax.methods import Method
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors.layout import Inputs

LONGEST_ANSWER = 2**20  # tokens; more than any model's context


def replay(
    params: dict,
    config: FamilyConfig,
    prompt: Inputs,
    method: Method | None,
    answers: Sequence[Sequence[int]],
    tap: Tap,
    host: Host = ALONE,
) -> Iterator[Tapped]:
    """Yields the arrays that `tap` requests at each token of the answers.

    Args:
        params, config: those of the model.
        prompt: B prompts.
        method: the method that the answers were generated with.
        answers: the tokens of each answer, as in `Output.tokens`.
        tap: the request; with rows "all", the first item has all prompt rows.
        host: devices and tokenizers.

    Yields:
        One item for each of the T tokens of the longest answer, from the rows that produced that token: the first from
            the prompt, then one per decode step. S, the number of columns, is the prompt's in the first item and the
            cache's in later ones. Samples with shorter answers run on padding.

    Raises:
        LVLMError: the number of answers is not the number of prompts.
    """
    _check(answers, prompt)
    longest = max(map(len, answers))
    if longest == 0:
        return
    state, step = branches.prefill(params, config, prompt, method, longest, host, tap=tap)
    yield step.tapped
    for index in range(longest - 1):
        tokens = [answer[index] if index < len(answer) else config.pad_token_id for answer in answers]
        state, step = decode_loop.decode_step(params, config, state, jnp.asarray(tokens, jnp.int32))
        yield step.tapped


def _check(answers: Any, prompt: Inputs) -> None:
    """Raises an `LVLMError` unless `answers` are the tokens of one answer per prompt."""
    if not isinstance(answers, Sequence) or not all(map(_are_tokens, answers)):
        raise LVLMError(f"answers are {shown(answers)}; expected a list of token ids for each conversation")
    if len(answers) != prompt.batch:
        raise LVLMError(f"{len(answers)} answers were given for {prompt.batch} conversations; give one each")


def _are_tokens(answer: Any) -> bool:
    is_list = isinstance(answer, Sequence | np.ndarray) and not isinstance(answer, str | bytes)
    if not is_list or len(answer) > LONGEST_ANSWER:
        return False
    return all(isinstance(token, int | np.integer) and 0 <= token < LARGEST_INT for token in answer)


def image_attention(
    params: dict,
    config: FamilyConfig,
    prompt: Inputs,
    method: Method | None,
    answers: Sequence[Sequence[int]],
    host: Host = ALONE,
) -> list[Float[np.ndarray, "L T H N"]]:
    """How much the main branch attended to each image token while it produced given answers; arguments as in `replay`.

    Returns:
        Per sample, the attention weights of every layer and head over its N image tokens (of all its images, in order),
        for the row that produced each of its T tokens.

    Raises:
        LVLMError: the number of answers is not the number of prompts.
    """
    _check(answers, prompt)
    rows: list[list[np.ndarray]] = [[] for _ in answers]
    steps = replay(params, config, prompt, method, answers, Tap(layers=None), host)
    for index, tapped in enumerate(steps):
        weights = np.asarray(parallel.local(tapped.attention[:, 0, :, :, 0]))  # the main branch's only row
        for sample, answer in enumerate(answers):
            if index < len(answer):
                image_columns = np.flatnonzero(prompt.image_id[sample] > 0)
                rows[sample].append(weights[:, sample][:, :, image_columns])
    return [np.stack(steps_of_row, axis=1) if steps_of_row else np.zeros((0, 0, 0, 0)) for steps_of_row in rows]
