"""Generates the answers to a batch of prompts: prefill, then the loop on the device or a search."""

import jax.numpy as jnp

from lvlm_jax.generation import branches, decode_loop, searches
from lvlm_jax.generation.host import ALONE, Host
from lvlm_jax.generation.output import Output
from lvlm_jax.generation.sampling import sample_keys
from lvlm_jax.generation.settings import GREEDY, Decoding
from lvlm_jax.methods import Method
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors.layout import Inputs, bucket

STOP_STRING_INTERVAL = 16  # tokens between two checks for stop strings


def generate(
    params: dict,
    config: FamilyConfig,
    prompt: Inputs,
    method: Method | None = None,
    decoding: Decoding = GREEDY,
    host: Host = ALONE,
) -> Output:
    """Answers a batch of prompts.

    Args:
        params, config: those of the model.
        prompt: the prompts.
        method: the method; None for plain decoding.
        decoding: how the answers are decoded.
        host: devices and tokenizers.

    Raises:
        LVLMError: the settings do not fit the prompts or the method.
    """
    if searches.obstacle(method, decoding):
        best = searches.best_answers(params, config, prompt, method, decoding, host)
        return host.read(best, decoding.stop)
    answers, limit = begin(params, config, prompt, method, decoding, host)
    interval = STOP_STRING_INTERVAL if decoding.stop else limit
    pause = 0
    while True:
        pause = min(pause + interval, limit)
        answers = decode_loop.run(params, config, answers, jnp.int32(pause))
        output = host.read(answers, decoding.stop)
        if pause == limit or all(reason == "stop" for reason in output.finish_reason):
            return output


def begin(
    params: dict, config: FamilyConfig, prompt: Inputs, method: Method | None, decoding: Decoding, host: Host = ALONE
) -> tuple[decode_loop.Answers, int]:
    """Prefills the prompts and chooses the first tokens; also returns how many tokens may be written.

    Raises:
        LVLMError: the number of seeds is not the number of prompts.
    """
    keys = sample_keys(decoding.seed, prompt.batch)
    limit = decoding.limit(config, prompt)
    capacity = bucket(limit)
    state, step = branches.prefill(params, config, prompt, method, capacity, host)
    answers = decode_loop.begin(
        state,
        step.combined,
        prompt.tokens,
        decoding.sampling,
        keys,
        host.stops(config, decoding),
        answer_capacity=capacity,
    )
    return answers, limit
