"""Answers as users get them: text, tokens, log-probabilities, and why each ended."""

import dataclasses
from typing import Any

import numpy as np

from lvlm_jax import parallel
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation.beam import Finished
from lvlm_jax.generation.drivers import Answers
from lvlm_jax.processors import text


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
        LVLMError: stop strings without a tokenizer.
    """
    fields = parallel.local((answers.length, answers.finished, answers.tokens, answers.logprobs))
    lengths, finished, written, logprobs = map(np.asarray, fields)
    tokens = [row[:length].tolist() for row, length in zip(written, lengths, strict=True)]
    reasons = ["stop" if done else "length" for done in finished]
    texts = [""] * len(tokens)
    if tokenizer is not None:
        texts = [text.decode(tokenizer, row) for row in tokens]
        for sample, answer in enumerate(texts):
            cut = text.first_stop(answer, strings)
            if cut is not None:
                texts[sample], reasons[sample] = answer[:cut], "stop"
                tokens[sample] = tokens[sample][: text.tokens_before(tokenizer, tokens[sample], cut)]
    elif strings:
        raise LVLMError("stop strings need a tokenizer, and this model has none; use stop_token_ids")
    probabilities = [row[: len(kept)].tolist() for row, kept in zip(logprobs, tokens, strict=True)]
    return Output(texts, tokens, probabilities, reasons)
