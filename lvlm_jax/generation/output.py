"""`Output`: text, tokens, log-probabilities, and why each answer ended."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from lvlm_jax import parallel
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation.beam import Finished
from lvlm_jax.generation.decode_loop import Answers
from lvlm_jax.processors import text

NOT_FINITE = (
    "are not finite (NaN or infinite), so no token can be chosen; load the model in float32 or bfloat16 if this was "
    "float16, else look for weights that are not finite or a method's strength that is too large"
)


@dataclasses.dataclass(frozen=True)
class Output:
    """Answers, one entry per conversation.

    Attributes:
        text: the answers, without special tokens, cut before a stop string.
        tokens: generated token ids, including the stop token.
        logprobs: log-probability of each token under the method's logits, before penalty, temperature and filters.
        finish_reason: "stop" after a stop token or string, otherwise "length".
    """

    text: list[str]
    tokens: list[list[int]]
    logprobs: list[list[float]]
    finish_reason: list[str]


def read_output(answers: Answers | Finished, strings: tuple[str, ...], tokenizer: Any | None) -> Output:
    """Copies the answers from the device and cuts them at stop strings.

    Args:
        answers: the answers so far.
        strings: stop strings, as in `settings.Decoding`.
        tokenizer: the checkpoint's; without one, texts are empty.

    Raises:
        LVLMError: some logits were not finite.
    """
    fields = parallel.local((answers.length, answers.finished, answers.tokens, answers.logprobs))
    lengths, finished, token_rows, logprobs = map(np.asarray, fields)
    _check_finite(logprobs, lengths)
    tokens = [row[:length].tolist() for row, length in zip(token_rows, lengths, strict=True)]
    reasons = ["stop" if is_finished else "length" for is_finished in finished]
    texts = [""] * len(tokens)
    if tokenizer is not None:
        special = text.special_tokens(tokenizer)
        for sample, row in enumerate(tokens):
            place = _before_stop(tokenizer, row, [one for one in strings if one not in special], special)
            texts[sample] = text.decode(tokenizer, row)
            if place is not None:
                count, cut = place
                texts[sample], tokens[sample], reasons[sample] = texts[sample][:cut], row[:count], "stop"
    probabilities = [row[: len(place)].tolist() for row, place in zip(logprobs, tokens, strict=True)]
    return Output(texts, tokens, probabilities, reasons)


def _before_stop(
    tokenizer: Any, tokens: list[int], strings: Sequence[str], special: Collection[str]
) -> tuple[int, int] | None:
    """The number of tokens before a stop string, and the number of characters of their text; None without one.

    Args:
        strings: stop strings, except special tokens: these are stop tokens (`Host.stops`).
        special: tokens that the text leaves out; strings that contain one are searched for in the raw text.
    """
    with_special = [one for one in strings if any(token in one for token in special)]
    cuts = []
    if plain := [one for one in strings if one not in with_special]:
        cut = text.first_stop(text.decode(tokenizer, tokens), plain)
        if cut is not None:
            cuts.append((text.tokens_before(tokenizer, tokens, cut), cut))
    if with_special:
        place = text.first_stop(text.decode_raw(tokenizer, tokens), with_special)
        if place is not None:
            count = text.tokens_before(tokenizer, tokens, place, text.decode_raw)
            cuts.append((count, len(text.decode(tokenizer, tokens[:count]))))
    return min(cuts, default=None)


def _check_finite(logprobs: Float[np.ndarray, "B M"], lengths: Int[np.ndarray, "B"]) -> None:
    """Raises an `LVLMError` if a token's log-probability is NaN (see `Sampling.pick`)."""
    for sample, (row, length) in enumerate(zip(logprobs, lengths, strict=True)):
        places = np.flatnonzero(np.isnan(row[:length]))
        if len(places):
            which_sample = f"sample {sample}: " if len(lengths) > 1 else ""
            raise LVLMError(f"{which_sample}the logits of answer token {places[0] + 1} {NOT_FINITE}")
