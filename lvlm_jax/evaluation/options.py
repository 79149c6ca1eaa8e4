"""Measures how much a model prefers a question's right option to the others (`evaluation.margins`).

Options are scored as the method would have written them (`generation.forcing`), stop token included.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax import parallel
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation.engine import Work, collect
from lvlm_jax.evaluation.protocol import Protocol
from lvlm_jax.evaluation.question import Question
from lvlm_jax.evaluation.shares import Key
from lvlm_jax.generation import forcing
from lvlm_jax.generation.output import NOT_FINITE
from lvlm_jax.methods import Method
from lvlm_jax.processors import answer_tokens

LOG = "margins"  # name of the logs
FLOOR = -100.0  # nats; the log-probability of an option that a plausibility cut rules out


def log_margins(
    model: Any, questions: Sequence[Question], protocol: Protocol, method: Method | None, work: Work, title: str
) -> dict[Key, float]:
    """The margins of questions in nats, by question.

    Args:
        model: an `LVLM`.
        questions: questions with `options` in `extra`, the right option first.
        work: its logs are called "margins".
    """
    most = max(len(question.extra["options"]) for question in questions)
    every = dict.fromkeys(option for question in questions for option in question.extra["options"])
    written = {option: tokens_of(model, option) for option in every}
    longest = max(map(len, written.values()))

    def respond(messages: list[list[dict]], seeds: list[int], batch: list[Question]) -> list[dict]:
        options = [list(question.extra["options"]) for question in batch]
        # Missing options repeat the last one, which changes no maximum.
        answers = [[written[one] for one in own + own[-1:] * (most - len(own))] for own in options]
        prompt = model.prepare(messages)
        forced = forcing.forced_inputs(model.params, model.config, prompt, method, answers, model.host, longest)
        with parallel.ambient(model.mesh):
            sums = _logprobs(model.params, model.config, forced, jax.tree.map(jnp.asarray, method), prompt.image_count)
        likely = np.maximum(np.asarray(parallel.local(sums), np.float64), FLOOR)
        if np.isnan(likely).any():
            raise LVLMError(f"the logits of the options {NOT_FINITE}")
        return [{"margin": round(float(row[0] - row[1:].max()), 6)} for row in likely]

    rows_by_key = collect(model, questions, protocol, respond, work, LOG, title)
    return {key: row["margin"] for key, row in rows_by_key.items()}


@functools.partial(jax.jit, static_argnums=(1, 4))
def _logprobs(
    params: dict, config: Any, inputs: forcing.ForcedInputs, method: Method | None, image_count: int
) -> jax.Array:
    """Log-probability of each answer, `[B, N]`."""
    return forcing.logprobs(params, config, inputs, method, image_count).sum(axis=-1)


def tokens_of(model: Any, answer: str) -> list[int]:
    """The tokens of an answer as a generation writes it, with the chat template's text around it and the stop token."""
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "?"), ("assistant", answer))
    ]
    encoded = answer_tokens.encode(model.processor, model.config.eos_token_ids, messages, last_only=True)
    return encoded.ids[encoded.answers].tolist()
