"""Beam search, and the searches that belong to methods.

A method that is a search names it in `Method.search`, and the function that runs it is in this module. All other
methods write their answers token by token.
"""

from collections.abc import Callable

import numpy as np

from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import beam, branches, opera
from lvlm_jax.generation.host import ALONE, Host
from lvlm_jax.generation.settings import GREEDY, Decoding
from lvlm_jax.methods import Method
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors.layout import Inputs, bucket


def obstacle(method: Method | None, decoding: Decoding = GREEDY) -> str | None:
    """Why answers cannot be written token by token; None if they can."""
    if method is not None and method.search is not None:
        return f"{method.label} is a search and may take tokens back"
    return "a beam search may take tokens back" if decoding.num_beams > 1 else None


def best_answers(
    params: dict, config: FamilyConfig, prompt: Inputs, method: Method | None, decoding: Decoding, host: Host = ALONE
) -> beam.Finished:
    """The best answer to each prompt, by the method's own search or by a beam search.

    Raises:
        LVLMError: there are settings of sampling, the method does not support beams, or its search is unknown.
    """
    if decoding.sampling.rules:
        raise LVLMError(
            "a beam search has no sampling and no repetition penalty; leave temperature and "
            "repetition_penalty out, or use num_beams=1"
        )
    search = _beam_search
    if method is not None and method.search is not None:
        if method.search not in SEARCHES:
            names = ", ".join(SEARCHES)
            raise LVLMError(f"{method.label} has the search {method.search!r}; expected one of {names}")
        search = SEARCHES[method.search]
    limit = decoding.limit(config, prompt)
    rule = beam.Rule(host.stops(config, decoding), np.int32(limit), np.float32(decoding.length_penalty))
    return search(params, config, prompt, method, decoding.num_beams, rule, bucket(limit), host)


def _beam_search(
    params: dict,
    config: FamilyConfig,
    prompt: Inputs,
    method: Method | None,
    num_beams: int,
    rule: beam.Rule,
    answer_capacity: int,
    host: Host,
) -> beam.Finished:
    if method is not None and method.warm_up_fields:
        raise LVLMError(f"{method.label} keeps a vector for every prompt and has no beams; use it with num_beams=1")
    state, step = branches.prefill(params, config, prompt, method, answer_capacity, host)
    search = beam.begin(state, step.combined, beams=num_beams, answer_capacity=answer_capacity)
    return beam.run(params, config, search, rule).hypotheses.best(rule.stop)


def _opera(
    params: dict,
    config: FamilyConfig,
    prompt: Inputs,
    method: Method,
    num_beams: int,
    rule: beam.Rule,
    answer_capacity: int,
    host: Host,
) -> beam.Finished:
    if num_beams not in (1, method.beams):
        raise LVLMError(f"num_beams is {num_beams} and OPERA's beams {method.beams}; give one of them")
    tap = opera.tap(config)
    state, step = branches.prefill(params, config, prompt, None, answer_capacity, host, tap=tap)
    return opera.run(params, config, state, step.combined, method, rule, answer_capacity)


SEARCHES: dict[str, Callable[..., beam.Finished]] = {"opera": _opera}
