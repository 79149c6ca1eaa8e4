"""Answers as users get them: text, tokens, log-probabilities, and why each ended."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from lvlm_jax import parallel
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation.beam import Finished
from lvlm_jax.generation.drivers import Answers
from lvlm_jax.processors import text

NOT_FINITE = (
    "are not finite (NaN or infinite), so they tell no token; load the model in float32 or bfloat16 if this was "
    "float16, else look for weights that are not finite or a method's strength that is too large"
)


@dataclasses.dataclass(frozen=True)
class Output:
    """Answers, one entry per conversation.

    Attributes:
        text: the answers, without special tokens, cut before a stop string.
        tokens: generated token ids, the stop token included.
        logprobs: of those tokens under the distribution they were chosen from, before temperature and filters.
        finish_reason: "stop" after a stop token or string, "length" otherwise.
    """

    text: list[str]
    tokens: list[list[int]]
    logprobs: list[list[float]]
    finish_reason: list[str]


def read_output(answers: Answers | Finished, strings: tuple[str, ...], tokenizer: Any | None) -> Output:
    """Reads the answers so far from the device and cuts them at stop strings.

    Args:
        strings: stop strings, as `settings.Decoding` has them.
        tokenizer: the checkpoint's; None leaves the texts empty.

    Raises:
        LVLMError: logits that were not finite.
    """
    fields = parallel.local((answers.length, answers.finished, answers.tokens, answers.logprobs))
    lengths, finished, written, logprobs = map(np.asarray, fields)
    _check_finite(logprobs, lengths)
    tokens = [row[:length].tolist() for row, length in zip(written, lengths, strict=True)]
    reasons = ["stop" if done else "length" for done in finished]
    texts = [""] * len(tokens)
    if tokenizer is not None:
        special = text.special_tokens(tokenizer)
        for sample, row in enumerate(tokens):
            kept = _before_stop(tokenizer, row, [one for one in strings if one not in special], special)
            texts[sample] = text.decode(tokenizer, row)
            if kept is not None:
                count, cut = kept
                texts[sample], tokens[sample], reasons[sample] = texts[sample][:cut], row[:count], "stop"
    probabilities = [row[: len(kept)].tolist() for row, kept in zip(logprobs, tokens, strict=True)]
    return Output(texts, tokens, probabilities, reasons)


def _before_stop(
    tokenizer: Any, tokens: list[int], strings: Sequence[str], special: Collection[str]
) -> tuple[int, int] | None:
    """How many tokens, and how many characters of their text, stand before a stop string; None without any.

    Args:
        strings: stop strings, but for those that are a special token: these are stop tokens (`Host.stops`).
        special: tokens that the text leaves out, so that strings with one of them are looked for in what was written.
    """
    mixed = [one for one in strings if any(token in one for token in special)]
    cuts = []
    if plain := [one for one in strings if one not in mixed]:
        cut = text.first_stop(text.decode(tokenizer, tokens), plain)
        if cut is not None:
            cuts.append((text.tokens_before(tokenizer, tokens, cut), cut))
    if mixed:
        place = text.first_stop(text.written(tokenizer, tokens), mixed)
        if place is not None:
            count = text.tokens_before(tokenizer, tokens, place, text.written)
            cuts.append((count, len(text.decode(tokenizer, tokens[:count]))))
    return min(cuts, default=None)


def _check_finite(logprobs: Float[np.ndarray, "B M"], lengths: Int[np.ndarray, "B"]) -> None:
    """Refuses answers with a token whose log-probability is NaN (`Sampling.pick`)."""
    for sample, (row, length) in enumerate(zip(logprobs, lengths, strict=True)):
        places = np.flatnonzero(np.isnan(row[:length]))
        if len(places):
            where = f"sample {sample}: " if len(lengths) > 1 else ""
            raise LVLMError(f"{where}the logits of answer token {places[0] + 1} {NOT_FINITE}")
