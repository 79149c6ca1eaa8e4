"""Conversations as token ids, with the tokens marked that an answer consists of.

The prompt is tokenised as at inference, so that the model learns to go on from exactly what it will be given. What the
chat template writes between a prompt and what follows an answer is the answer, its stop token included. Some templates
write other blanks into a prompt once it is answered: what is learned has those of the prompt.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from lvlm_jax.errors import LVLMError
from lvlm_jax.processors import inputs, templates


class Tokens(NamedTuple):
    """A conversation's token ids, and which of them are learned."""

    ids: Int[np.ndarray, " U"]
    answers: Bool[np.ndarray, " U"]


def encode(
    processor: Any, stops: Collection[int], messages: list[dict], last_only: bool, expanded: Callable[[str], str] = str
) -> Tokens:
    """Token ids of a conversation that ends with an answer.

    Args:
        processor: the checkpoint's transformers processor.
        stops: tokens that end an answer. When the template writes none behind the last answer, the tokenizer's
            own end token is added, or the first of these.
        messages: `{"role", "content"}`, content a string or a list of text and image parts, images without pictures.
        last_only: whether the last answer alone is learned, or the assistant's every message.
        expanded: what the processor makes of a text before it is tokenised, if it has images.

    Raises:
        LVLMError: the chat template is broken or refuses the conversation, it writes a prompt differently once it is
            answered (other blanks aside), or there is no end token.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    messages = templates.in_template_form(processor, messages)
    rendered, text, ids, spans = "", "", [], []
    for turn in turns[-1:] if last_only else turns:
        asked = templates.render(processor, messages[:turn], True)
        answered = templates.render(processor, messages[: turn + 1], False).rstrip()
        answer = _answer(asked, answered)
        if not asked.startswith(rendered) or answer is None:
            raise LVLMError(
                "the chat template writes a prompt differently once it is answered, so the answer's tokens cannot be "
                "told apart; give the checkpoint a template that only appends (chat_template.jinja)"
            )
        prompt = text + asked[len(rendered) :]
        ids = _extended(processor, ids, expanded(text), expanded(prompt))
        start = len(ids)
        text, rendered = prompt + answer, answered
        ids = _extended(processor, ids, expanded(prompt), expanded(text))
        spans.append(slice(start, len(ids)))
    if ids[-1] not in (*stops, processor.tokenizer.eos_token_id):
        ids = [*ids, _end(processor.tokenizer, stops)]
        spans[-1] = slice(spans[-1].start, len(ids))
    answers = np.zeros(len(ids), bool)
    for span in spans:
        answers[span] = True
    return Tokens(np.asarray(ids, np.int32), answers)


def _answer(asked: str, answered: str) -> str | None:
    """What `answered` adds to `asked`, also where the two differ by blanks; None where they differ by more."""
    if answered.startswith(asked):
        return answered[len(asked) :]
    place = 0
    for letter in "".join(asked.split()):
        while place < len(answered) and answered[place].isspace():
            place += 1
        if answered[place : place + 1] != letter:
            return None
        place += 1
    answer = answered[place:]
    return answer.lstrip() if asked[-1:].isspace() else answer  # the prompt has its blanks


def _extended(processor: Any, ids: list[int], text: str, longer: str) -> list[int]:
    """The ids of `text`, then those of what `longer` adds to it."""
    together = inputs.token_ids(processor, longer).tolist()
    if together[: len(ids)] == ids:
        return together
    # A token would reach across the seam, which no prompt at inference has.
    return ids + list(processor.tokenizer(longer[len(text) :], add_special_tokens=False)["input_ids"])


def _end(tokenizer: Any, stops: Collection[int]) -> int:
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id
    if not stops:
        raise LVLMError(
            "neither the tokenizer nor the model names a token that ends an answer; set eos_token_id in config.json"
        )
    return next(iter(stops))
