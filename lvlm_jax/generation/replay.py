"""Given answers, fed token by token as decoding does, and what a tap sees meanwhile."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lvlm_jax import parallel
from lvlm_jax.attention import Tap, Tapped
from lvlm_jax.errors import LVLMError, shown
from lvlm_jax.generation import branches, drivers
from lvlm_jax.generation.host import ALONE, Host
from lvlm_jax.generation.settings import LARGEST_INT
from lvlm_jax.methods import Method
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors.layout import Inputs

LONGEST_ANSWER = 2**20  # tokens; more than any model can hold


def replay(
    params: dict,
    config: FamilyConfig,
    prompt: Inputs,
    method: Method | None,
    answers: Sequence[Sequence[int]],
    tap: Tap,
    host: Host = ALONE,
) -> Iterator[Tapped]:
    """What `tap` asks for at each token of the answers: first what the prompt gives, then each decode step.

    Args:
        params, config: of the model.
        prompt: B prompts.
        method: the method that the answers were generated with.
        answers: the tokens of each answer, as `Output.tokens` has them.
        tap: the request; with rows "all" the first item has all prompt rows.
        host: devices and tokenizers.

    Yields:
        For each of the T tokens of the longest answer what the rows that produced it gave. S, the number of columns,
        is the prompt's in the first item and the cache's in the others. Samples whose answers are over are fed padding.

    Raises:
        LVLMError: another number of answers than prompts.
    """
    _check(answers, prompt)
    longest = max(map(len, answers))
    if longest == 0:
        return
    state, step = branches.prefill(params, config, prompt, method, longest, host, tap=tap)
    yield step.tapped
    for index in range(longest - 1):
        fed = [answer[index] if index < len(answer) else config.pad_token_id for answer in answers]
        state, step = drivers.decode_step(params, config, state, jnp.asarray(fed, jnp.int32))
        yield step.tapped


def _check(answers: Any, prompt: Inputs) -> None:
    """Refuses what are not the tokens of one answer for each prompt."""
    if not isinstance(answers, Sequence) or not all(map(_are_tokens, answers)):
        raise LVLMError(f"answers are {shown(answers)}; expected a list of token ids for each conversation")
    if len(answers) != prompt.batch:
        raise LVLMError(f"{len(answers)} answers were given for {prompt.batch} conversations; give one each")


def _are_tokens(answer: Any) -> bool:
    given = isinstance(answer, Sequence | np.ndarray) and not isinstance(answer, str | bytes)
    if not given or len(answer) > LONGEST_ANSWER:
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
    """Where the main branch looked while it produced given answers; arguments as in `replay`.

    Returns:
        Per sample the attention weights of every layer and head over its N image tokens (of all its images, in order),
        for the row that produced each of its T tokens.

    Raises:
        LVLMError: another number of answers than prompts.
    """
    _check(answers, prompt)
    rows: list[list[np.ndarray]] = [[] for _ in answers]
    seen = replay(params, config, prompt, method, answers, Tap(layers=None), host)
    for index, tapped in enumerate(seen):
        weights = np.asarray(parallel.local(tapped.attention[:, 0, :, :, 0]))  # the main branch's only row
        for sample, answer in enumerate(answers):
            if index < len(answer):
                image_columns = np.flatnonzero(prompt.image_id[sample] > 0)
                rows[sample].append(weights[:, sample][:, :, image_columns])
    return [np.stack(taken, axis=1) if taken else np.zeros((0, 0, 0, 0)) for taken in rows]
