"""The engine's jobs and their updates."""

import dataclasses
import enum
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from lvlm_jax.errors import LVLMError
from lvlm_jax.generation.settings import Decoding
from lvlm_jax.methods import Method
from lvlm_jax.serving.prompts import Prompt

FAULT = "the server failed at this request; its log says why"


class Priority(enum.IntEnum):
    """Order of jobs: interactive ones, then batches."""

    PERSON = 0
    BATCH = 1


class Update(NamedTuple):
    """An answer so far.

    Attributes:
        text: the text so far.
        tokens, logprobs: the tokens so far, and their log-probabilities in nats.
        top, top_logprobs: the most likely tokens of each step, `[T, K]`; None unless requested.
        reason: "stop" or "length"; None while the answer is unfinished.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    top: np.ndarray | None
    top_logprobs: np.ndarray | None
    reason: str | None


@dataclasses.dataclass(eq=False)
class Job:
    """One answer to generate.

    Attributes:
        prompt: the laid-out prompt.
        method: the method; None for plain decoding.
        decoding: how to decode; its seed is one number.
        tell: called by the engine's thread with every `Update`, or with the error.
        pieces: whether text is needed before the end (streaming).
        wants_top: whether to keep the most likely tokens of every step.
        deadline: the latest time of the answer, in `time.monotonic`.
        priority: order among jobs.
        cancelled: anybody may set it; the engine then drops the job silently.
        arrived, began: the times of arrival and of the first token.
    """

    prompt: Prompt
    method: Method | None
    decoding: Decoding
    tell: Callable[[Update | LVLMError], None]
    pieces: bool = False
    wants_top: bool = False
    deadline: float = float("inf")
    priority: Priority = Priority.PERSON
    cancelled: bool = False
    arrived: float = dataclasses.field(default_factory=time.monotonic)
    began: float | None = None

    @property
    def structure(self) -> Any:
        """The structure of the method, which all jobs of one lane share."""
        return jax.tree.structure(self.method)


class Late(LVLMError):
    """The deadline of a request has passed."""
