"""Rows of the server without its threads: long prompts in chunks, while other answers continue."""

import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.generation import chunks, decode_loop, rows
from lvlm_jax.generation.continuous import PromptSize
from lvlm_jax.generation.settings import Decoding
from lvlm_jax.serving.lane import Lane
from lvlm_jax.serving.limits import Limits
from lvlm_jax.serving.prefill import Prefill
from lvlm_jax.serving.prompts import Prompts
from lvlm_jax.serving.work import Job
from tests.small import conversation


@pytest.mark.parametrize(
    "method", [pytest.param(None, id="none", marks=pytest.mark.slow), pytest.param(methods.CMAC(alpha=1.0), id="cmac")]
)
def test_answers_go_on_between_the_chunks_of_a_long_prompt(model, monkeypatch, method):
    monkeypatch.setattr(chunks, "ROWS", 8)
    done = []
    for place, name in ((decode_loop, "extended"), (rows, "run"), (rows, "place")):
        call = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *a, call=call, name=name, **k: done.append(name) or call(*a, **k))
    limits, told = Limits(rows=3, max_tokens=24), {}
    prompts = Prompts(model, 1, 32)
    lane = Lane(
        model, limits, Prefill(model, limits), PromptSize((96,), 32, 1), lambda job, said: told.update({job: said})
    )
    asked = [conversation("Eh"), conversation("Eh?", seed=4), conversation("Oh")]
    jobs = [
        Job(prompts.laid_out(model.prepare(one)), method, Decoding(24, stop_token_ids=()), lambda said: None)
        for one in asked
    ]
    try:
        for job in jobs:
            lane.enqueue(job)
        while lane.busy:
            lane.admit()
            if lane.under_way:
                lane.advance()
                told.update(lane.collect(0.0))
    finally:
        prompts.close()
    chunked = [index for index, name in enumerate(done) if name == "extended"]
    assert len(chunked) == 3 and done.index("place") < chunked[1]  # the first prompt does not wait
    assert all("run" in done[one:other] for one, other in zip(chunked, chunked[1:], strict=False))
    for job, one in zip(jobs, asked, strict=True):
        want = model.generate(one, method=method, max_new_tokens=24, stop_token_ids=[])
        assert told[job].tokens == want.tokens[0]
        np.testing.assert_allclose(told[job].logprobs, want.logprobs[0], atol=1e-4)
