"""Answers in the form of OpenAI's chat completions: complete, and streamed as server-sent events."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lvlm_jax.processors.text import StreamWriter
from lvlm_jax.serving.work import Update

DONE = b"data: [DONE]\n\n"


def event(value: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


@dataclasses.dataclass(frozen=True)
class Reply:
    """Fields that all parts of the answer to one request share.

    Attributes:
        id, created, model: OpenAI's fields.
        prompt_tokens: number of prompt tokens, image tokens included.
        tokenizer: decodes single tokens into text.
        top: how many of the most likely tokens to show per step; None without log-probabilities.
        extra: further fields of this server, under "lvlm".
    """

    id: str
    created: int
    model: str
    prompt_tokens: int
    tokenizer: Any
    top: int | None
    extra: dict[str, Any]

    def whole(self, answers: Sequence[Update]) -> dict[str, Any]:
        """A chat completion with every answer as a choice."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": update.text, "refusal": None},
                "logprobs": self.logprobs(update, 0),
                "finish_reason": update.reason,
            }
            for index, update in enumerate(answers)
        ]
        head = self._head("chat.completion")
        return head | {"choices": choices, "usage": self.usage(answers), "lvlm": self.extra}

    def usage(self, answers: Sequence[Update]) -> dict[str, int]:
        """Token counts of all answers together; image tokens count as prompt tokens."""
        completion_tokens = sum(len(update.tokens) for update in answers)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        }

    def chunk(
        self, index: int, delta: dict[str, Any], logprobs: dict | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        """A chunk of one choice (one of the answers to a request)."""
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def last(self, answers: Sequence[Update]) -> dict[str, Any]:
        """The last chunk, which has the token counts."""
        head = self._head("chat.completion.chunk")
        return head | {"choices": [], "usage": self.usage(answers), "lvlm": self.extra}

    def logprobs(self, update: Update, start: int) -> dict[str, Any] | None:
        """Log-probabilities from token `start` on, under the method's distribution before temperature."""
        if self.top is None:
            return None
        content = []
        for place in range(start, len(update.tokens)):
            alike = []
            if self.top and update.top is not None:
                pairs = zip(update.top[place][: self.top], update.top_logprobs[place][: self.top], strict=True)
                alike = [self._token(int(token), float(logprob)) for token, logprob in pairs if np.isfinite(logprob)]
            content.append(self._token(update.tokens[place], update.logprobs[place]) | {"top_logprobs": alike})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class Pieces:
    """Turns the updates of one choice into chunks."""

    def __init__(self, reply: Reply, index: int, stop: Sequence[str]):
        self._reply, self._index, self._writer = reply, index, StreamWriter(stop)
        self._tokens = 0  # with log-probabilities already sent

    def first(self) -> dict[str, Any]:
        """The first chunk, which has the role."""
        return self._reply.chunk(self._index, {"role": "assistant", "content": ""})

    def chunks(self, update: Update) -> list[dict[str, Any]]:
        """The new chunks of an update; the last chunk has the reason why the answer ended."""
        is_finished = update.reason is not None
        piece = self._writer.push(update.text, final=is_finished)
        new_chunks = []
        if piece or (is_finished and len(update.tokens) > self._tokens and self._reply.top is not None):
            logprobs = self._reply.logprobs(update, self._tokens)
            self._tokens = len(update.tokens)
            new_chunks.append(self._reply.chunk(self._index, {"content": piece}, logprobs))
        if is_finished:
            new_chunks.append(self._reply.chunk(self._index, {}, None, update.reason))
        return new_chunks
