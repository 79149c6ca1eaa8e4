"""Answers are finite or an error, and stop strings that are special tokens stop, however answers are asked for."""

import contextlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken

from lvlm_jax import LVLM, methods
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import engine
from lvlm_jax.evaluation.protocol import get
from lvlm_jax.evaluation.question import Question
from lvlm_jax.generation import decode_loop, jobs
from lvlm_jax.generation.sampling import Sampling, sample_keys
from tests.small import conversation

GOOD, BAD = conversation("What?", seed=3), conversation("Zoo?", seed=3)
NEW = {"max_new_tokens": 6}
NOT_FINITE = "logits of answer token 1 are not finite"
OPERA = methods.OPERA(beams=2, candidates=2)


def with_row(model, token, value):
    """The model with another embedding of a token."""
    params = {**model.params, "language_model": {**model.params["language_model"]}}
    table = params["language_model"]["embed_tokens"]["embedding"]
    params["language_model"]["embed_tokens"] = {"embedding": table.at[token].set(value)}
    assert "lm_head" in params["language_model"]  # else every answer would be broken
    return LVLM(params, model.config, model.folder)


@pytest.fixture(scope="module")
def broken(model):
    """The small model, with NaN as the embedding of the letter Z."""
    return with_row(model, model.processor.tokenizer.convert_tokens_to_ids("Z"), jnp.nan)


def test_an_answer_whose_logits_are_not_finite_is_an_error(broken):
    """The error names the sample."""
    for ask in (
        lambda: broken.generate(BAD, **NEW),
        lambda: broken.generate(BAD, temperature=1.0, top_p=0.9, repetition_penalty=1.1, **NEW),
        lambda: broken.generate(BAD, stop="never", **NEW),
        lambda: broken.generate(BAD, num_beams=2, **NEW),
        lambda: broken.generate(BAD, OPERA, **NEW),
        lambda: list(broken.stream(BAD, **NEW)),
    ):
        with pytest.raises(LVLMError, match=NOT_FINITE):
            ask()
    with pytest.raises(LVLMError, match=f"^sample 1: the {NOT_FINITE}"):
        broken.generate([GOOD, BAD], **NEW)
    with pytest.raises(LVLMError, match=f"^setting 0 of the sweep: sample 1: the {NOT_FINITE}"):
        broken.sweep([GOOD, BAD], [methods.CMAC(alpha=1.0), methods.CMAC(alpha=2.0)], **NEW)
    questions = [Question(1, (), "What?", "yes", "random"), Question(2, (), "Zoo?", "yes", "random")]
    for schedule in ("batches", "continuous"):
        work = engine.Work(batch_size=2, schedule=schedule)
        with pytest.raises(LVLMError, match=NOT_FINITE):
            engine.ask(broken, questions, get("pope/strict"), work=work)


def test_other_answers_are_those_of_a_sound_model(broken, model):
    want = model.generate(GOOD, **NEW)
    assert broken.generate(GOOD, **NEW) == want
    many = dict(broken.generate_many([(GOOD, 0), (BAD, 0), (GOOD, 0)], batch_size=2, **NEW))
    assert many[0].tokens == many[2].tokens == want.tokens
    assert isinstance(many[1], LVLMError) and NOT_FINITE in str(many[1])


@pytest.mark.parametrize("continuous", [False, True])
def test_a_job_answers_the_other_questions(broken, tmp_path, continuous):
    lines = [{"question_id": n, "text": text} for n, text in enumerate(["What?", "Zoo?", "Who?"])]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def load():
        return jobs.streamer(broken, 2, **NEW) if continuous else jobs.answerer(broken, **NEW)

    places = (tmp_path / "q.jsonl", tmp_path / "a.jsonl")
    summary = jobs.run_job(load, *places, {}, tmp_path, batch_size=2, streams=continuous)
    assert summary.now == 2 and list(summary.failures) == [2] and NOT_FINITE in summary.failures[2]
    answered = [json.loads(line)["question_id"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert answered == [0, 2]


def test_logits_that_become_infinite_later_are_an_error_too(model):
    """The answer ends there, and the token is named."""
    first = model.generate(GOOD, **NEW).tokens[0]
    place = next(place for place, token in enumerate(first) if token not in first[:place] and place)
    later = with_row(model, first[place], jnp.inf)
    for ask in (later.generate, lambda *given, **options: list(later.stream(*given, **options))):
        with pytest.raises(LVLMError, match=f"answer token {place + 2} are not finite"):
            ask(GOOD, **NEW)


def test_a_row_is_sound_unless_it_has_nan_infinity_or_nothing_finite(broken):
    """The device does not continue a failed answer."""
    for row, sound in (
        ([0.0, 1.0, -np.inf], True),
        ([-np.inf, 3.0, -np.inf], True),
        ([0.0, np.nan, 1.0], False),
        ([0.0, np.inf, 1.0], False),
        ([-np.inf, -np.inf, -np.inf], False),
    ):
        for temperature in (0.0, 1.0):
            sampling, logits = Sampling.of(temperature=temperature, top_k=2), jnp.asarray([row], jnp.float32)
            _, logprobs = sampling.pick(logits, sample_keys(0, 1), jnp.int32(0), None)
            assert bool(jnp.isnan(logprobs[0])) != sound
    state, step = broken.prefill(BAD, max_length=90)
    arguments = state, step.combined, broken.prepare(BAD).tokens, Sampling.of(), sample_keys(0, 1)
    begun = decode_loop.begin(*arguments, np.asarray([-1], np.int32), answer_capacity=8)
    assert bool(begun.finished[0])


@pytest.fixture(scope="module")
def talker(model):
    """The tokens of an answer, and the index of one that is a plain letter and no stop token."""
    tokens = model.generate(GOOD, **NEW).tokens[0]
    words = model.processor.tokenizer.convert_ids_to_tokens(tokens)
    return tokens, next(place for place, word in enumerate(words) if place and word.isascii())


@contextlib.contextmanager
def made_special(tokenizer, word):
    """Inside this context, the tokenizer leaves a token out of texts."""
    before = tokenizer.backend_tokenizer.to_str()
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False)], special_tokens=True)
    try:
        yield
    finally:
        tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(before)


@pytest.mark.parametrize("stop", ["{word}", "{letter}{word}"], ids=["alone", "behind a letter"])
def test_stop_strings_with_a_special_token_stop(model, talker, stop):
    tokens, place = talker
    tokenizer = model.processor.tokenizer
    (word,) = tokenizer.convert_ids_to_tokens(tokens[place : place + 1])
    stop = stop.format(letter=tokenizer.decode([tokens[place - 1]]), word=word)
    kept = place + 1 if stop == word else place - 1
    with made_special(tokenizer, word):
        whole = model.generate(GOOD, **NEW)
        assert whole.tokens[0] == tokens and whole.finish_reason == ["length"]
        out = model.generate(GOOD, stop=["never", stop], **NEW)
        assert out.finish_reason == ["stop"]
        assert out.tokens[0] == tokens[:kept] and len(out.logprobs[0]) == kept
        assert out.text == [tokenizer.decode(tokens[:kept], skip_special_tokens=True).strip()]
        assert "".join(model.stream(GOOD, stop=stop, **NEW)) == out.text[0]
        ((_, many),) = model.generate_many([(GOOD, 0)], stop=stop, **NEW)
        assert (many.text, many.tokens, many.finish_reason) == (out.text, out.tokens, out.finish_reason)
