"""Answers in the form of OpenAI's chat completions: whole, and in pieces as server-sent events."""

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
    """What all parts of the answer to one request share.

    Attributes:
        id, created, model: as OpenAI names them.
        prompt_tokens: of the request, image tokens included.
        tokenizer: for the texts of single tokens.
        top: most likely tokens shown of each step; None without log-probabilities.
        extra: what this server says besides, under "lvlm".
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
                "message": {"role": "assistant", "content": said.text, "refusal": None},
                "logprobs": self.logprobs(said, 0),
                "finish_reason": said.reason,
            }
            for index, said in enumerate(answers)
        ]
        head = self._head("chat.completion")
        return head | {"choices": choices, "usage": self.usage(answers), "lvlm": self.extra}

    def usage(self, answers: Sequence[Update]) -> dict[str, int]:
        """Token counts of all answers together; an image token is a token of the prompt."""
        written = sum(len(said.tokens) for said in answers)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
        }

    def chunk(
        self, index: int, delta: dict[str, Any], logprobs: dict | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        """A chunk of one choice."""
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def last(self, answers: Sequence[Update]) -> dict[str, Any]:
        """The chunk that counts tokens."""
        head = self._head("chat.completion.chunk")
        return head | {"choices": [], "usage": self.usage(answers), "lvlm": self.extra}

    def logprobs(self, said: Update, start: int) -> dict[str, Any] | None:
        """Log-probabilities from token `start` on: of the distribution that the method makes, before temperature."""
        if self.top is None:
            return None
        content = []
        for place in range(start, len(said.tokens)):
            alike = []
            if self.top and said.top is not None:
                pairs = zip(said.top[place][: self.top], said.top_logprobs[place][: self.top], strict=True)
                alike = [self._token(int(token), float(logprob)) for token, logprob in pairs if np.isfinite(logprob)]
            content.append(self._token(said.tokens[place], said.logprobs[place]) | {"top_logprobs": alike})
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
        self._tokens = 0  # whose log-probabilities were sent

    def first(self) -> dict[str, Any]:
        """The chunk with the role."""
        return self._reply.chunk(self._index, {"role": "assistant", "content": ""})

    def chunks(self, said: Update) -> list[dict[str, Any]]:
        """What is new in an update; behind the last one the reason why the answer ended."""
        done = said.reason is not None
        piece = self._writer.push(said.text, final=done)
        found = []
        if piece or (done and len(said.tokens) > self._tokens and self._reply.top is not None):
            logprobs = self._reply.logprobs(said, self._tokens)
            self._tokens = len(said.tokens)
            found.append(self._reply.chunk(self._index, {"content": piece}, logprobs))
        if done:
            found.append(self._reply.chunk(self._index, {}, None, said.reason))
        return found
