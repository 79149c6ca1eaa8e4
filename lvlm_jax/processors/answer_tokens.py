"""Conversations as token ids, with a mark on the tokens of answers.

The prompt is tokenised as at inference, so that the model learns to continue exactly what it will receive. The answer
is everything that the chat template writes between a prompt and the text after the answer, its stop token included.
Some templates write other blanks in a prompt that has an answer; training uses the blanks of a prompt without one.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from lvlm_jax.errors import LVLMError
from lvlm_jax.processors import inputs, templates


class Tokens(NamedTuple):
    """A conversation's token ids, and a mask of the learned tokens."""

    ids: Int[np.ndarray, " U"]
    answers: Bool[np.ndarray, " U"]


def encode(
    processor: Any, stops: Collection[int], messages: list[dict], last_only: bool, expanded: Callable[[str], str] = str
) -> Tokens:
    """Token ids of a conversation that ends with an answer.

    Args:
        processor: the checkpoint's transformers processor.
        stops: tokens that end an answer. If the template writes none after the last answer, the tokenizer's own end
            token is added, or the first of these.
        messages: `{"role", "content"}`; content is a string or a list of text and image parts, without the images
            themselves.
        last_only: learn only the last answer instead of all messages of the assistant.
        expanded: function that expands the image markers of a text as the processor does before it tokenises.

    Raises:
        LVLMError: the chat template is broken or refuses the conversation, it changes a prompt (apart from blanks) once
            it is answered, it leaves the answer out, or there is no end token.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    messages = templates.in_template_form(processor, messages)
    rendered, text, ids, spans = "", "", [], []
    for turn in turns[-1:] if last_only else turns:
        prompt_text = templates.render(processor, messages[:turn], True)
        full_text = templates.render(processor, messages[: turn + 1], False).rstrip()
        answer = _answer(prompt_text, full_text)
        if not prompt_text.startswith(rendered) or answer is None:
            raise LVLMError(
                "the chat template writes a prompt differently once it is answered, so the answer's tokens cannot be "
                "recognised; give the checkpoint a template that only appends (chat_template.jinja)"
            )
        if not answer.strip():
            raise LVLMError(
                "the chat template does not write the answer; give the checkpoint another template "
                "(chat_template.jinja)"
            )
        prompt = text + prompt_text[len(rendered) :]
        ids = _extended(processor, ids, expanded(text), expanded(prompt))
        start = len(ids)
        text, rendered = prompt + answer, full_text
        ids = _extended(processor, ids, expanded(prompt), expanded(text))
        spans.append(slice(start, len(ids)))
    if ids[-1] not in (*stops, processor.tokenizer.eos_token_id):
        ids = [*ids, _end(processor.tokenizer, stops)]
        spans[-1] = slice(spans[-1].start, len(ids))
    answers = np.zeros(len(ids), bool)
    for span in spans:
        answers[span] = True
    return Tokens(np.asarray(ids, np.int32), answers)


def _answer(prompt: str, complete: str) -> str | None:
    """The text that `complete` adds to `prompt`, ignoring different blanks; None if they differ otherwise."""
    if complete.startswith(prompt):
        return complete[len(prompt) :]
    place = 0
    for letter in "".join(prompt.split()):
        while place < len(complete) and complete[place].isspace():
            place += 1
        if complete[place : place + 1] != letter:
            return None
        place += 1
    answer = complete[place:]
    return answer.lstrip() if prompt[-1:].isspace() else answer  # the prompt already has the blanks


def _extended(processor: Any, ids: list[int], text: str, longer: str) -> list[int]:
    """The ids of `text`, followed by the ids of the rest of `longer`."""
    together = inputs.token_ids(processor, longer).tolist()
    if together[: len(ids)] == ids:
        return together
    # A token would span the boundary, which does not happen at inference.
    return ids + list(processor.tokenizer(longer[len(text) :], add_special_tokens=False)["input_ids"])


def _end(tokenizer: Any, stops: Collection[int]) -> int:
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id
    if not stops:
        raise LVLMError(
            "neither the tokenizer nor the model names a token that ends an answer; set eos_token_id in config.json"
        )
    return next(iter(stops))
