"""Sampling against independent probabilities and transformers' own logits processors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lvlm_jax.errors import LVLMError
from lvlm_jax.generation.sampling import Sampling, sample_keys

DRAWS = 40_000
VOCABULARY = 24
STEP = jnp.int32(0)
pick = jax.jit(lambda sampling, *arguments: sampling.pick(*arguments))

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.4},
    {"temperature": 1.7, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.3, "top_k": 9, "top_p": 0.8},
    {"temperature": 1.0, "top_k": VOCABULARY + 10, "top_p": 1.0},
    {"temperature": 1.0, "top_p": 1e-6},
]


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(size=VOCABULARY).astype(np.float32) * 2


def probabilities(logits, temperature, top_k=0, top_p=1.0):
    """Float64 probabilities of every token, by sorting."""
    order = np.argsort(-logits.astype(np.float64), kind="stable")
    scaled = logits[order].astype(np.float64) / temperature
    kept = np.exp(scaled - scaled[0])
    if top_k:
        kept[top_k:] = 0
    kept /= kept.sum()
    if top_p < 1:
        kept[1:][np.cumsum(kept)[:-1] >= top_p] = 0
        kept /= kept.sum()
    result = np.empty_like(kept)
    result[order] = kept
    return result


def processed(logits, temperature, top_k=0, top_p=1.0):
    """Probabilities after transformers' warpers, in the order `generate` applies them."""
    scores = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits)[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(-1)[0].double().numpy()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_tokens_are_drawn_with_their_probabilities(logits, settings):
    best, _ = pick(Sampling.of(), jnp.asarray(np.stack([logits, -logits])), sample_keys(0, 2), STEP, None)
    np.testing.assert_array_equal(best, [logits.argmax(), logits.argmin()])
    expected = probabilities(logits, **settings)
    np.testing.assert_allclose(processed(logits, **settings), expected, rtol=0, atol=1e-6)
    rows = jnp.broadcast_to(logits, (DRAWS, VOCABULARY))
    tokens, _ = pick(Sampling.of(**settings), rows, sample_keys(1, DRAWS), STEP, None)
    frequency = np.bincount(tokens, minlength=VOCABULARY) / DRAWS
    assert (frequency[expected == 0] == 0).all()
    deviation = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(frequency - expected) <= 5 * deviation).all()


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 5.0}, {"temperature": 5.0, "top_k": 20, "top_p": 0.999}], ids=str
)
def test_what_is_never_taken_and_log_probabilities(logits, settings):
    """A method rules tokens out with -inf; neither a high temperature nor a generous filter brings them back.

    Log-probabilities are those of the unmodified logits.
    """
    allowed = np.array([3, 11])
    ruled = np.full_like(logits, -np.inf)
    ruled[allowed] = logits[allowed]
    rows = jnp.broadcast_to(ruled, (2000, VOCABULARY))
    sampling = Sampling.of(repetition_penalty=1.3, **settings)
    tokens, logprobs = pick(sampling, rows, sample_keys(0, 2000), STEP, jnp.ones(rows.shape, bool))
    assert set(np.unique(tokens)) == (set(allowed.tolist()) if settings else {allowed[logits[allowed].argmax()]})
    assert np.isfinite(logprobs).all()
    rows = jnp.asarray(np.stack([np.roll(logits, shift) for shift in range(6)]))
    tokens, logprobs = pick(sampling, rows, sample_keys(0, 6), STEP, jnp.ones(rows.shape, bool))
    wide = np.asarray(rows, np.float64)
    expected = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    np.testing.assert_allclose(logprobs, expected[np.arange(6), tokens], rtol=0, atol=1e-5)


def test_repetition_penalty_equals_that_of_transformers():
    generator = np.random.default_rng(2)
    logits = generator.normal(size=(500, VOCABULARY)).astype(np.float32)
    history = generator.integers(0, VOCABULARY, (500, 12))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, history, True, axis=1)
    scores = RepetitionPenaltyLogitsProcessor(1.8)(torch.from_numpy(history), torch.from_numpy(logits))
    expected = scores.argmax(-1).numpy()
    assert (expected != logits.argmax(-1)).mean() > 0.1
    tokens, _ = pick(
        Sampling.of(repetition_penalty=1.8), jnp.asarray(logits), sample_keys(0, 500), STEP, jnp.asarray(seen)
    )
    np.testing.assert_array_equal(tokens, expected)


def test_prompt_and_answer_count_as_seen(torch_model, model, alone):
    """End to end: transformers' greedy generation with the same penalty, image prompt included."""
    sample = alone(2)
    inputs = {name: torch.from_numpy(array) for name, array in sample.items()}
    with torch.no_grad():
        expected = torch_model.generate(
            **inputs, max_new_tokens=16, do_sample=False, repetition_penalty=1.4, use_cache=True
        )
    out = model.generate(sample, max_new_tokens=16, repetition_penalty=1.4)
    assert out.tokens[0] == expected[0, -16:].tolist()
    assert out.tokens != model.generate(sample, max_new_tokens=16).tokens


@pytest.fixture(scope="module")
def sampled(model, mixed):
    """sampled(seed, prompts=mixed): tokens of a sampled generation."""
    return lambda seed, prompts=mixed: (
        model.generate(prompts, max_new_tokens=8, temperature=1.5, top_p=0.95, seed=seed).tokens
    )


def test_seeds(model, mixed, sampled, alone):
    """One gives the same tokens again; one for each conversation gives what it gives alone."""
    assert sampled(5) == sampled(5) != sampled(6)
    together, changed = sampled([7, 8, 9]), sampled([7, 8, 10])
    assert sampled([7, 8, 9]) == together == [sampled(seed, alone(row))[0] for row, seed in enumerate([7, 8, 9])]
    assert changed[:2] == together[:2] and changed[2] != together[2]
    with pytest.raises(LVLMError, match="2 seeds were given for 3 conversations"):
        model.generate(mixed, temperature=1.0, seed=[1, 2])


def test_conversations_of_a_batch_have_their_own_streams(logits):
    keys = sample_keys(0, 64)
    rows = jnp.zeros((64, VOCABULARY))
    first, _ = pick(Sampling.of(temperature=1.0), rows, keys, jnp.int32(0), None)
    second, _ = pick(Sampling.of(temperature=1.0), rows, keys, jnp.int32(1), None)
    assert len(np.unique(first)) > 12
    assert (np.asarray(first) == np.asarray(second)).mean() < 0.3
