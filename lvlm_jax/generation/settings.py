"""`Decoding`: how answers are decoded, as one frozen value. It validates all settings.

    Decoding(max_new_tokens=64, temperature=0.7, top_p=0.9, seed=3)

Commands, adapters and the methods of `LVLM` all build this value, so a bad setting causes the same message everywhere,
and before any work is done. Jitted programs receive the settings as arrays (`Decoding.sampling`), so another number
compiles nothing.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import numpy as np
from jaxtyping import Int

from lvlm_jax.errors import LVLMError, shown
from lvlm_jax.generation.sampling import Sampling
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors.layout import Inputs

LARGEST_INT = 2**31 - 1  # largest int32, the type of counts in programs
LARGEST_SEED = 2**32 - 1  # above this, two seeds may give the same random keys
LARGEST_FLOAT = float(np.finfo(np.float32).max)
SMALLEST_FLOAT = float(np.finfo(np.float32).tiny)  # smaller numbers may count as zero on a device
SMALLEST_TEMPERATURE = 1e-30  # logits divided by it stay finite, even with a penalty
LARGEST_PENALTY = 1e4  # largest repetition penalty; its inverse is the smallest
MAX_ITEMS = 100_000  # largest number of seeds or stop tokens
LARGEST_EXPONENT = 10.0  # largest length penalty: 6,900 tokens to this power are finite
MAX_STOPS, MAX_STOP_CHARACTERS = 100, 10_000  # largest number of stop strings, and of their characters together
NO_TOKEN = -1  # a token id that does not exist


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are decoded. `**vars(decoding)` are the keyword arguments of `LVLM.generate`.

    Attributes:
        max_new_tokens: longest answer; it may be shorter because of the context.
        temperature: divides the logits before a token is drawn; 0 takes the most likely token.
        top_k: draws from the k most likely tokens; 0 from all.
        top_p: draws from the fewest tokens whose probability, after temperature and top-k, reaches p; 1 from all.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen before; 1 changes nothing.
        seed: random seed; one number, or one per conversation of a batch.
        stop: strings that end an answer; they are not part of it.
        stop_token_ids: tokens that end an answer; None for those of the checkpoint.
        num_beams: above 1, a beam search as in transformers.
        length_penalty: a beam search divides log-probabilities by length to this power.

    Raises:
        LVLMError: a setting has the wrong type or is out of range; the message says which, and what is expected.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | tuple[int, ...] = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] | None = None
    num_beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self):
        values = {
            "max_new_tokens": whole_number("max_new_tokens", self.max_new_tokens, low=1),
            "temperature": _temperature(self.temperature),
            "top_k": whole_number("top_k", self.top_k, low=0),
            "top_p": _number("top_p", self.top_p, SMALLEST_FLOAT, 1.0),
            "repetition_penalty": _number(
                "repetition_penalty", self.repetition_penalty, 1 / LARGEST_PENALTY, LARGEST_PENALTY
            ),
            "seed": _seeds(self.seed),
            "stop": _stop_strings(self.stop),
            "stop_token_ids": _stop_tokens(self.stop_token_ids),
            "num_beams": whole_number("num_beams", self.num_beams, low=1),
            "length_penalty": _number("length_penalty", self.length_penalty, -LARGEST_EXPONENT, LARGEST_EXPONENT),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def sampling(self) -> Sampling:
        """How a token is chosen, as arrays for a jitted program."""
        return Sampling.of(self.temperature, self.top_k, self.top_p, self.repetition_penalty)

    def limit(self, config: FamilyConfig, prompt: Inputs) -> int:
        """How many tokens may be written after a prompt: `max_new_tokens`, or fewer because of the context."""
        return min(self.max_new_tokens, config.text.max_position_embeddings - int(prompt.lengths.max()))

    def stops(self, config: FamilyConfig) -> Int[np.ndarray, "N"]:
        """Ids of the tokens that end an answer; only `NO_TOKEN` if there are none."""
        ids = config.eos_token_ids if self.stop_token_ids is None else self.stop_token_ids
        return np.asarray(tuple(ids) or (NO_TOKEN,), np.int32)


def whole_number(name: str, value: Any, low: int, high: int = LARGEST_INT) -> int:
    """Validates a setting that is a whole number.

    Raises:
        LVLMError: it is not a whole number, or out of range.
    """
    number = _real(value)
    if number is None or not low <= number <= high or number != int(number):
        raise LVLMError(f"{name} is {_shown(value)}; expected a whole number from {low} to {high}")
    return int(number)


def seed_of_request(value: Any) -> int:
    """Validates the seed of one conversation.

    Raises:
        LVLMError: it is not a whole number, or out of range.
    """
    return whole_number("seed", value, low=0, high=LARGEST_SEED)


def _number(name: str, value: Any, low: float, high: float, expected: str = "a number") -> float:
    number = _real(value)
    if number is None or not low <= number <= high:
        raise LVLMError(f"{name} is {_shown(value)}; expected {expected} from {low:.3g} to {high:.3g}")
    return float(number)


def _temperature(value: Any) -> float:
    if _real(value) == 0:
        return 0.0
    return _number("temperature", value, SMALLEST_TEMPERATURE, LARGEST_FLOAT, "0, or a number")


def _seeds(value: Any) -> int | tuple[int, ...]:
    several = isinstance(value, list | tuple | range) or getattr(value, "ndim", 0) == 1
    return tuple(map(seed_of_request, _items("seed", value))) if several else seed_of_request(value)


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else _items("stop", value)
    if strings is None or not all(isinstance(one, str) for one in strings):
        raise LVLMError(f"stop is {_shown(value)}; expected a string, or a list of strings")
    if "" in strings:
        raise LVLMError("a stop string is empty, and every answer begins with it; leave it out")
    if len(strings) > MAX_STOPS or sum(map(len, strings)) > MAX_STOP_CHARACTERS:
        raise LVLMError(
            f"{len(strings)} stop strings of {sum(map(len, strings))} characters are looked for in every answer; give "
            f"at most {MAX_STOPS} of together {MAX_STOP_CHARACTERS}"
        )
    return strings


def _stop_tokens(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    tokens = None if isinstance(value, str) else _items("stop_token_ids", value)
    if tokens is None:
        raise LVLMError(f"stop_token_ids is {_shown(value)}; expected a list of token ids")
    return tuple(whole_number("stop_token_ids", token, low=0) for token in tokens)


def _items(name: str, value: Any) -> tuple | None:
    """The items of a list or another iterable, which may be endless; None for other values."""
    if isinstance(value, dict | bytes) or not isinstance(value, Iterable) or not getattr(value, "ndim", 1):
        return None
    items = tuple(itertools.islice(value, MAX_ITEMS + 1))
    if len(items) > MAX_ITEMS:
        raise LVLMError(f"{name} has too many items; expected at most {MAX_ITEMS}")
    return items


def _scalar(value: Any) -> Any:
    """The item of a zero-dimensional array; other values as they are."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _real(value: Any) -> Real | None:
    """A finite number, also from a zero-dimensional array; None for other values."""
    value = _scalar(value)
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    return value if isinstance(value, int) or math.isfinite(value) else None


def _shown(value: Any) -> str:
    return shown(_scalar(value))


GREEDY = Decoding()
