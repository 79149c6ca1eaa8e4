"""Beam search against transformers' own: tokens, scores, where answers end."""

import numpy as np
import pytest
import torch

from lvlm_jax import methods
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import beam
from tests import checkpoints
from tests.slow import cases, named

LIMIT = 12


@pytest.fixture(scope="module")
def theirs(torch_model):
    """theirs(inputs, **settings): transformers' answers as lists of new tokens, and their scores."""

    def generate(inputs, stop=(), **settings):
        given = checkpoints.to_torch(inputs)
        with torch.no_grad():
            out = torch_model.generate(
                **given, max_new_tokens=LIMIT, do_sample=False, eos_token_id=list(stop) or None, pad_token_id=0,
                return_dict_in_generate=True, output_scores=True, **settings,
            )  # fmt: skip
        rows = []
        for row in out.sequences[:, given["input_ids"].shape[1] :].tolist():
            ends = [place for place, token in enumerate(row) if token in stop]
            rows.append(row[: ends[0] + 1] if ends else row)
        return rows, out.sequences_scores.numpy()

    return generate


def scores(out, length_penalty=1.0):
    return [sum(row) / len(row) ** length_penalty for row in out.logprobs]


@pytest.mark.parametrize("beams", named([2, 5], slow=[5]))
def test_tokens_and_scores_are_those_of_transformers(model, mixed, theirs, beams, all_programs_kept):
    """Lengths and penalties are data: others compile nothing."""

    def programs():
        return beam.run._cache_size(), beam.begin._cache_size()

    tokens, expected = theirs(mixed, num_beams=beams)
    out = model.generate(mixed, max_new_tokens=LIMIT, num_beams=beams, stop_token_ids=[])
    assert out.tokens == tokens and out.finish_reason == ["length"] * 3
    np.testing.assert_allclose(scores(out), expected, rtol=0, atol=1e-5)
    greedy = model.generate(mixed, max_new_tokens=LIMIT)
    assert any(found != short for found, short in zip(out.tokens, greedy.tokens, strict=True))
    before = programs()
    model.generate(mixed, max_new_tokens=7, num_beams=beams, stop_token_ids=[7], length_penalty=0.5)
    assert programs() == before


@pytest.mark.parametrize("count", [1, 3], ids=["one stop token", "three stop tokens"])
def test_stop_tokens_and_length_penalty_are_those_of_transformers(model, mixed, theirs, count):
    whole = model.generate(mixed, max_new_tokens=LIMIT, num_beams=3)
    stop = [whole.tokens[0][5], whole.tokens[1][3], whole.tokens[2][7]][-count:]
    settings, lengths = {"num_beams": 3, "max_new_tokens": LIMIT, "stop_token_ids": stop}, set()
    for penalty in (0.0, 1.0, 3.0):
        tokens, expected = theirs(mixed, num_beams=3, stop=stop, length_penalty=penalty)
        out = model.generate(mixed, length_penalty=penalty, **settings)
        assert out.tokens == tokens
        np.testing.assert_allclose(scores(out, penalty), expected, rtol=0, atol=1e-5)
        ended = [row[-1] in stop for row in out.tokens]
        assert out.finish_reason == ["stop" if end else "length" for end in ended]
        lengths.add(tuple(len(row) for row in out.tokens))
    assert len(lengths) > 1  # answers do end early, and the penalty decides where


@pytest.mark.parametrize(
    ("method", "rows"), cases({"plain": (None, (0, 1, 2)), "cmac": (methods.CMAC(alpha=1.0), (2,))}, slow=["cmac"])
)
def test_a_batch_equals_its_conversations_alone(model, mixed, alone, method, rows):
    settings = {"max_new_tokens": 8, "num_beams": 3}
    together = model.generate(mixed, method, **settings)
    for row in rows:
        single = model.generate(alone(row), method, **settings)
        assert single.tokens[0] == together.tokens[row]
        np.testing.assert_allclose(single.logprobs[0], together.logprobs[row], rtol=0, atol=1e-4)


def test_beams_of_a_method_follow_its_own_distribution(model, mixed):
    """Replayed token by token, the method's log-probabilities are those of the beam that was found."""
    method = methods.CMAC(alpha=1.0)
    out = model.generate(mixed, method, max_new_tokens=6, num_beams=3)
    state, step = model.prefill(mixed, method)
    for place, column in enumerate(np.array(out.tokens).T):
        logprobs = torch.log_softmax(torch.tensor(np.asarray(step.combined)), dim=-1).numpy()
        for row, token in enumerate(column):
            assert logprobs[row, token] == pytest.approx(out.logprobs[row][place], abs=1e-4)
        state, step = model.decode(state, column)
    assert out.tokens != model.generate(mixed, max_new_tokens=6, num_beams=3).tokens


def test_what_a_beam_search_cannot_do_is_said(model, mixed):
    for settings, message in (
        ({"temperature": 0.5}, "has no sampling"),
        ({"repetition_penalty": 1.2}, "repetition penalty"),
        ({"method": methods.VISTA()}, "VISTA keeps a vector"),
    ):
        with pytest.raises(LVLMError, match=message):
            model.generate(mixed, num_beams=2, **settings)
