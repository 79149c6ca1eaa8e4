"""Settings of a generation: one value, checked in one place, before any work is done."""

import dataclasses
import inspect
import itertools
from decimal import Decimal
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import LVLM, methods
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation.settings import GREEDY, NO_TOKEN, Decoding
from tests.small import conversation

NAN, INFINITY = float("nan"), float("inf")
WHOLE_FROM_1 = "expected a whole number from 1 to 2147483647"
TEMPERATURE = "expected 0, or a number from 1e-30 to 3.4e+38"
SEED = "expected a whole number from 0 to 4294967295"

WHOLE = "expected a whole number from 0 to 2147483647"
TOP_P, PENALTY = "expected a number from 1.18e-38 to 1", "expected a number from 0.0001 to 1e+04"
STRINGS, TOKENS = "expected a string, or a list of strings", "expected a list of token ids"
LENGTH_PENALTY = "expected a number from -10 to 10"

# Setting -> what is expected, and what is not.
WRONG = {
    "max_new_tokens": (WHOLE_FROM_1, [0, -3, True, "8", 1.5, None, [8], 2**31, NAN]),
    "temperature": (TEMPERATURE, ["0.7", None, [0.7], False, -0.1, NAN, INFINITY, 1e-45, 1e-60, 1e39, 1j,
                                  Decimal("0.5"), np.ones((2, 2))]),
    "top_k": (WHOLE, [-1, 2.5, "all"]),
    "top_p": (TOP_P, [0, 1.1, 1e-45, None]),
    "repetition_penalty": (PENALTY, [0, -2.0, 1e39, 1e-60]),
    "seed": (SEED, [-1, 2**32, "7", None, 0.5]),
    "stop": (STRINGS, [None, 3, ["a", 3]]),
    "stop_token_ids": (TOKENS, [3, "ab"]),
    "num_beams": (WHOLE_FROM_1, [0, "2"]),
    "length_penalty": (LENGTH_PENALTY, [NAN, 1e30]),
    "batch_size": (WHOLE_FROM_1, [0, 1.5, "8", True]),
}  # fmt: skip
BAD = [
    *((name, value, f"is {' '.join(repr(value).split())}; {expected}")
      for name, (expected, values) in WRONG.items() for value in values),
    ("temperature", 10**5000, f"is a very long int; {TEMPERATURE}"),
    ("seed", [1, -2], f"is -2; {SEED}"),
    *((name, value, "has too many items; expected at most 100000")
      for name, value in (("seed", range(10**12)), ("stop", range(10**12)), ("stop_token_ids", itertools.count()))),
    ("stop", ["a", ""], "string is empty, and every answer begins with it; leave it out"),
    ("stop_token_ids", [-1], f"is -1; {WHOLE}"),
    ("stop_token_ids", [[2]], f"is [2]; {WHOLE}"),
]  # fmt: skip

PROMPT = conversation("Hi")
CALLS = {
    "generate": lambda model, settings: model.generate(PROMPT, **settings),
    "stream": lambda model, settings: model.stream(PROMPT, **settings),
    "sweep": lambda model, settings: model.sweep(PROMPT, [methods.CMAC()], **settings),
    "generate_many": lambda model, settings: model.generate_many([(PROMPT, 0)], **settings),
}


def taken_by(call):
    return set(inspect.signature(getattr(LVLM, call)).parameters)


def test_every_setting_is_in_the_table_and_every_call_has_its_own():
    fields = {field.name for field in dataclasses.fields(Decoding)}
    assert fields == {name for name, *_ in BAD} - {"batch_size"}
    assert fields <= taken_by("generate")
    assert fields - {"num_beams", "length_penalty"} <= taken_by("stream")
    assert {"max_new_tokens", "temperature", "seed"} <= taken_by("sweep")
    assert {"max_new_tokens", "top_k", "stop_token_ids", "batch_size"} <= taken_by("generate_many")


@pytest.mark.parametrize("call", CALLS)
def test_a_bad_setting_is_named_in_one_line_before_any_work(call):
    """The model has no parameters and no configuration, so that nothing can be computed."""
    model = LVLM({}, None)
    table = [row for row in BAD if row[0] in taken_by(call)]
    assert len(table) >= 20
    for name, value, message in table:
        with pytest.raises(LVLMError) as raised:
            CALLS[call](model, {name: value})
        beginning = "a stop" if message.startswith("string") else name
        assert str(raised.value) == f"{beginning} {message}"


def test_numbers_of_every_kind_are_taken():
    given = Decoding(
        max_new_tokens=np.int64(8), temperature=jnp.float32(0.5), top_k=5.0, top_p=Fraction(1, 2),
        repetition_penalty=np.array(2), seed=np.array([0, 2**32 - 1]), stop="a", stop_token_ids=range(2, 4),
    )  # fmt: skip
    assert given == Decoding(8, 0.5, 5, 0.5, 2.0, (0, 2**32 - 1), ("a",), (2, 3))
    assert hash(given) == hash(Decoding(**vars(given)))
    kinds = [type(getattr(given, field.name)) for field in dataclasses.fields(given)]
    assert kinds == [int, float, int, float, float, tuple, tuple, tuple, int, float]
    with pytest.raises(dataclasses.FrozenInstanceError):
        given.temperature = 1.0


def test_what_ends_an_answer(model):
    own = dataclasses.replace(model.config, eos_token_ids=(7, 8))
    assert GREEDY.stops(own).tolist() == [7, 8]
    assert GREEDY.stops(dataclasses.replace(own, eos_token_ids=())).tolist() == [NO_TOKEN]
    assert Decoding(stop_token_ids=[]).stops(model.config).tolist() == [NO_TOKEN]
    assert Decoding(stop_token_ids=[4, 9]).stops(model.config).tolist() == [4, 9]


def test_extreme_numbers_that_are_taken_give_the_answers_they_should(model, mixed):
    greedy = model.generate(mixed, max_new_tokens=6)
    assert model.generate(mixed, max_new_tokens=6, temperature=1e-30).tokens == greedy.tokens
    assert model.generate(mixed, max_new_tokens=6, temperature=1.0, top_p=1.2e-38).tokens == greedy.tokens
    penalised = model.generate(mixed, max_new_tokens=6, repetition_penalty=1e-4)
    cold = model.generate(mixed, max_new_tokens=6, repetition_penalty=1e-4, temperature=1e-30)
    assert cold.tokens == penalised.tokens
    hot = model.generate(mixed, max_new_tokens=6, temperature=3.4e38, seed=2**32 - 1)
    assert np.isfinite(np.concatenate(hot.logprobs)).all()


def test_a_bad_seed_spoils_its_own_request_only(model):
    requests = [(PROMPT, 0), (PROMPT, -1), (PROMPT, "x"), (PROMPT, 1)]
    outputs = dict(model.generate_many(requests, max_new_tokens=2, batch_size=2))
    assert [isinstance(outputs[number], LVLMError) for number in range(4)] == [False, True, True, False]
    assert str(outputs[1]) == f"seed is -1; {SEED}" and str(outputs[2]) == f"seed is 'x'; {SEED}"
