"""The two decode loops against each other, and where an answer ends."""

import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import decode_loop
from lvlm_jax.generation.sampling import Sampling, sample_keys
from tests.small import CONTEXT, conversation

ROOM = 64  # one bucket
LIMIT = 12


def begun(model, inputs, method, sampling):
    prompt = model.prepare(inputs)
    state, step = model.prefill(prompt, method, int(prompt.lengths.max()) + ROOM)
    keys, stop = sample_keys([3, 4, 5], prompt.batch), np.asarray([-1], np.int32)
    return decode_loop.begin(state, step.combined, prompt.tokens, sampling, keys, stop, answer_capacity=ROOM)


@pytest.mark.parametrize(
    ("method", "sampling"),
    [
        (methods.CMAC(alpha=1.0), Sampling.of()),
        (None, Sampling.of(temperature=0.9, top_k=50, top_p=0.95, repetition_penalty=1.2)),
    ],
    ids=["cmac", "sampled"],
)
def test_the_loop_on_the_device_equals_the_loop_in_python(model, mixed, method, sampling):
    looped = decode_loop.run(model.params, model.config, begun(model, mixed, method, sampling), jnp.int32(LIMIT))
    columns = []
    first = begun(model, mixed, method, sampling)
    for answers in decode_loop.stream(model.params, model.config, first, LIMIT):
        columns.append(np.asarray(answers.tokens)[:, len(columns)])
    assert int(looped.count) == int(answers.count) == len(columns) == LIMIT
    np.testing.assert_array_equal(np.asarray(looped.tokens)[:, :LIMIT], np.stack(columns, axis=1))
    np.testing.assert_array_equal(looped.tokens, answers.tokens)
    np.testing.assert_allclose(looped.logprobs, answers.logprobs, rtol=0, atol=1e-5)
    assert (np.asarray(looped.length) == LIMIT).all() and not np.asarray(looped.finished).any()
    assert len(np.unique(columns)) > 3


@pytest.fixture(scope="module")
def greedy(model, mixed):
    return model.generate(mixed, max_new_tokens=24)


def test_a_batch_equals_its_conversations_alone(model, alone, greedy):
    for row in range(3):
        single = model.generate(alone(row), max_new_tokens=24)
        assert single.tokens[0] == greedy.tokens[row]
        np.testing.assert_allclose(single.logprobs[0], greedy.logprobs[row], rtol=0, atol=1e-4)
        assert single.text[0] == greedy.text[row]
    assert greedy.finish_reason == ["length"] * 3


def test_a_stop_token_ends_its_own_answer_only(model, mixed, greedy):
    stop = greedy.tokens[2][5]
    out = model.generate(mixed, max_new_tokens=24, stop_token_ids=[stop])
    for row, tokens in enumerate(greedy.tokens):
        stopped = stop in tokens
        length = tokens.index(stop) + 1 if stopped else 24
        assert out.tokens[row] == tokens[:length]
        assert out.logprobs[row] == pytest.approx(greedy.logprobs[row][:length], abs=1e-5)
        assert out.finish_reason[row] == ("stop" if stopped else "length")
    assert len(out.tokens[2]) <= 6
    assert {"length", "stop"} == set(out.finish_reason)


def test_where_an_answer_ends(model, alone, mixed, greedy):
    out = model.generate(alone(0), max_new_tokens=24, stop_token_ids=[greedy.tokens[0][0]])
    assert out.tokens == [greedy.tokens[0][:1]] and out.finish_reason == ["stop"]
    for limit in (1, 2, 23):
        out = model.generate(mixed, max_new_tokens=limit)
        assert out.tokens == [row[:limit] for row in greedy.tokens] and out.finish_reason == ["length"] * 3
    sample = alone(2)  # the context ends it
    out = model.generate(sample, max_new_tokens=10_000)
    assert len(out.tokens[0]) == CONTEXT - sample["input_ids"].shape[1] == 55
    assert out.tokens[0][:24] == greedy.tokens[2] and out.finish_reason == ["length"]


@pytest.fixture(scope="module")
def spoken(model):
    """A conversation, and its greedy answer of 24 tokens."""
    messages = conversation("What?", seed=1)
    return messages, model.generate(messages, max_new_tokens=24)


@pytest.mark.parametrize("place", [3, 20], ids=["early", "late"])
def test_a_stop_string_ends_the_answer_before_it(model, spoken, place):
    messages, whole = spoken
    text = whole.text[0]
    place = min(place, len(text) - 3)
    stop = text[place : place + 2]
    out = model.generate(messages, max_new_tokens=24, stop=["never said", stop])
    assert out.text == [text[: text.index(stop)]] and out.finish_reason == ["stop"]
    assert out.tokens[0] == whole.tokens[0][: len(out.tokens[0])]
    assert len(out.logprobs[0]) == len(out.tokens[0]) < 24
    kept = model.processor.tokenizer.decode(out.tokens[0], skip_special_tokens=True).strip()
    assert kept.startswith(out.text[0])
    pieces = list(model.stream(messages, max_new_tokens=24, stop=["never said", stop]))
    assert "".join(pieces) == out.text[0]


def test_a_stop_string_ends_its_own_answer_only(model, spoken):
    messages, whole = spoken
    other = conversation("No picture.")
    both = model.generate([messages, other], max_new_tokens=24)
    assert both.tokens[0] == whole.tokens[0]
    pairs = [both.text[0][start : start + 2] for start in range(len(both.text[0]) - 1)]
    stop = next(pair for pair in pairs if pair not in both.text[1])
    out = model.generate([messages, other], max_new_tokens=24, stop=stop)
    assert out.finish_reason == ["stop", "length"]
    assert out.text == [both.text[0][: both.text[0].index(stop)], both.text[1]]
    assert out.tokens[1] == both.tokens[1]


def test_streamed_pieces_are_the_answer(model, mixed, spoken):
    messages, whole = spoken
    assert model.generate(messages, max_new_tokens=24, stop="never said") == whole
    pieces = list(model.stream(messages, max_new_tokens=24))
    assert "".join(pieces) == whole.text[0] and len(pieces) > 4 and all(pieces)
    stop = [whole.tokens[0][9]]
    out = model.generate(messages, max_new_tokens=24, stop_token_ids=stop)
    assert "".join(model.stream(messages, max_new_tokens=24, stop_token_ids=stop)) == out.text[0]
    assert out.finish_reason == ["stop"]
    with pytest.raises(LVLMError, match="one conversation and got 3"):
        next(model.stream(mixed, max_new_tokens=4))


def test_arrays_of_a_method_survive_generation(model, mixed):
    """Steps donate their state, which holds the method; the user's own arrays must not go with it."""
    method = methods.CMAC(alpha=jnp.float32(1.0), beta=jnp.float32(0.2), gamma=jnp.float32(2.0))
    first = model.generate(mixed, method=method, max_new_tokens=LIMIT)
    assert model.generate(mixed, method=method, max_new_tokens=LIMIT) == first
    assert float(method.alpha) == 1.0
    assert first.tokens == model.generate(mixed, method=methods.CMAC(alpha=1.0), max_new_tokens=LIMIT).tokens
