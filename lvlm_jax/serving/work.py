"""What goes through the engine: answers to be written, and what is told about them."""

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
    """Who goes first: people who wait, then batches."""

    PERSON = 0
    BATCH = 1


class Update(NamedTuple):
    """An answer so far.

    Attributes:
        text: empty before the end, unless the job wants pieces.
        tokens, logprobs: of the answer.
        top, top_logprobs: the most likely tokens of each step, `[T, K]`; None unless the job wants them.
        reason: "stop" or "length"; None while the answer is under way.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    top: np.ndarray | None
    top_logprobs: np.ndarray | None
    reason: str | None


@dataclasses.dataclass(eq=False)
class Job:
    """One answer to be written.

    Attributes:
        prompt: laid out.
        method: None for plain decoding.
        decoding: how; its seed is one number.
        tell: called by the engine's thread with every `Update`, and with the fault where there is one.
        pieces: whether text is wanted before the end.
        wants_top: whether the most likely tokens of every step are.
        deadline: by `time.monotonic`.
        priority: who goes first.
        cancelled: set by anybody; the engine then forgets the job and tells nothing.
        arrived, began: when it came, and when its first token was there.
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
        """What the jobs of one lane have in common."""
        return jax.tree.structure(self.method)


class Late(LVLMError):
    """The time for a request is over."""
