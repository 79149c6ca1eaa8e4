"""Rows with strengths, sampling and stop tokens of their own give the answers that each gets alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.generation import continuous, rows
from lvlm_jax.generation.continuous import PromptSize
from lvlm_jax.generation.sampling import RowSampling, Sampling, sample_keys
from lvlm_jax.methods import Method
from lvlm_jax.serving.limits import Limits
from lvlm_jax.serving.prefill import Prefill
from lvlm_jax.serving.prompts import Prompts, columns_before, columns_behind
from tests.small import conversation

LIMIT = 20
DRAWN = [(0.0, 0, 1.0, 1.0), (0.9, 0, 1.0, 1.0), (0.7, 20, 0.9, 1.3), (0.0, 0, 1.0, 1.5)]
NAMES = ("temperature", "top_k", "top_p", "repetition_penalty")


def test_each_row_is_drawn_as_alone():
    generator = np.random.default_rng(0)
    logits = jnp.asarray(generator.normal(size=(len(DRAWN), 50)) * 3, jnp.float32).at[:, 7].set(-jnp.inf)
    seen = jnp.asarray(generator.random((len(DRAWN), 50)) < 0.3)
    for step in range(5):
        keys = sample_keys([9, 8, 7, 6], len(DRAWN))
        tokens, logprobs = RowSampling.of_rows(DRAWN).pick(logits, keys, jnp.int32(step), seen)
        for row, numbers in enumerate(DRAWN):
            one = slice(row, row + 1)
            alone = Sampling.of(*numbers).pick(logits[one], keys[one], jnp.int32(step), seen[one])
            assert (int(tokens[row]), float(logprobs[row])) == (int(alone[0][0]), float(alone[1][0]))


@pytest.mark.parametrize(
    "strengths",
    [
        pytest.param((None, None), marks=pytest.mark.slow),
        (methods.CMAC(alpha=1.0), methods.CMAC(alpha=4.0, beta=0.1)),
        *(
            pytest.param(pair, marks=pytest.mark.slow)
            for pair in (
                (methods.VCD(alpha=0.5), methods.VCD(alpha=2.0)),
                (methods.PAI(start_layer=0), methods.PAI(start_layer=0, alpha=0.5)),
                (methods.VISTA(layers=(0, 1)), methods.VISTA(layers=(0, 1), lambda_=0.5)),
                (methods.DoLa(layers=(0, 1)), methods.DoLa(layers=(0, 1))),
                (methods.chain(methods.EAH(), methods.CMAC()), methods.chain(methods.EAH(), methods.CMAC(alpha=1.0))),
                (methods.CMAC(variant="code", gate="first"), methods.CMAC(variant="code", gate="first", alpha=1.0)),
            )
        ),
    ],
    ids=lambda pair: pair[0].label if isinstance(pair[0], Method) else "plain",
)
def test_answers_are_those_of_generate(model, monkeypatch, strengths):
    monkeypatch.setattr(continuous, "answer_columns", lambda limit: (64, LIMIT + 4))  # rows move left again and again
    prefill, prompts = Prefill(model, Limits()), Prompts(model, 1, 32)
    asked = [conversation(text, seed) for text, seed in (("Eh?", 1), ("Oh", 2), ("No picture", None), ("E", 1))]
    slots, expected = None, []
    for place, messages in enumerate(asked):
        method = strengths[place % 2]
        numbers = DRAWN[place if method is None else place % 2 * 2]  # programs of two ways to draw are enough
        settings = dict(zip(NAMES, numbers, strict=True))
        expected.append(model.generate(messages, method=method, max_new_tokens=LIMIT, seed=place, **settings))
        prompt = prompts.laid_out(model.prepare(messages))
        while not prefill.ready(prompt, method):
            pass
        state, step = prompt.prefilled
        if slots is None:
            slots = rows.empty(
                state, batch=4, limit=LIMIT, vocabulary=step.combined.shape[1], size=PromptSize.of(state)
            )
        held = PromptSize.of(slots.slots.state, slots.slots.prompt)
        if (needed := held.union(PromptSize.of(state))) != held:
            slots = rows.widen(slots, needed)
        row = rows.NewRow(
            prompt.laid_out.tokens,
            sample_keys([place], 1),
            np.asarray([LIMIT], np.int32),
            np.asarray([place], np.int32),
            np.full(rows.STOPS, -1, np.int32),
            RowSampling.of_rows([numbers]),
            np.asarray([place == 0]),
        )
        slots = rows.place(slots, state, step.combined, row)
        slots = rows.run(model.params, model.config, slots, np.ones(4, bool), jnp.int32(3))  # others are under way
    while bool(slots.slots.running.any()):
        if int(slots.slots.state.index) == slots.slots.state.capacity:
            slots = rows.compact(slots)
        slots = rows.run(model.params, model.config, slots, np.ones(4, bool), jnp.int32(5))
    for place, output in enumerate(expected):
        count = int(slots.slots.count[place])
        assert slots.slots.tokens[place, :count].tolist() == output.tokens[0]
        np.testing.assert_allclose(slots.slots.logprobs[place, :count], output.logprobs[0], atol=1e-4)
    best = np.asarray(slots.top_logprobs[0, :LIMIT, 0])
    assert (best >= np.asarray(slots.slots.logprobs[0, :LIMIT]) - 1e-6).all()
    if prefill.shares(strengths[0]):
        assert prefill.prefixes.hits == 1 and prefill.images.misses == 2  # the first picture came twice


def test_sizes_come_from_a_ladder():
    before = {0: 0, 1: 64, 64: 64, 65: 128, 200: 256, 257: 384, 600: 768, 1100: 1536}
    assert {tokens: columns_before(tokens) for tokens in before} == before
    behind = {1: 32, 32: 32, 33: 128, 128: 128, 129: 512}
    assert {tokens: columns_behind(tokens) for tokens in behind} == behind
