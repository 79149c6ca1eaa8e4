"""Who goes into which row when: continuous batching seen from the host.

While the device decodes, the host lays out the prompts that come next and starts their prefill; it hands answers on as
they end. Every answer is the one that its conversation gets alone.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import continuous, opera
from lvlm_jax.generation.beam import Found
from lvlm_jax.generation.sampling import Sampling, sample_keys
from lvlm_jax.generation.state import State, Step
from lvlm_jax.methods import Method
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors.inputs import Conversation
from lvlm_jax.processors.layout import Inputs

SCHEDULES = ("auto", "continuous", "batches")
SHORT_ANSWER = (
    32  # tokens; answers that may be longer differ enough in length for rows to wait for each other
)
ROWS_PER_GROUP = (
    8  # prompts go in by one for so many rows: waiting for more keeps rows idle, fewer are read less well
)

Request = tuple[Conversation, int]  # with its random seed


def obstacle(method: Method | None, mesh: jax.sharding.Mesh | None) -> str | None:
    """Why rows cannot be replaced one by one; None where they can."""
    if mesh is not None and mesh.size > 1:
        return "a batch that is spread over devices has no rows to replace"
    if method is None:
        return None
    if opera.wanted(method):
        return f"{method.label} is a search of its own"
    memories = [jax.tree.leaves(jax.eval_shape(lambda rows=rows: method.start(rows))) for rows in (2, 3)]
    per_row = all(
        leaf.shape[:1] == (rows,) for rows, leaves in zip((2, 3), memories, strict=True) for leaf in leaves
    )
    if not (method.independent_rows and per_row):
        return f"{method.label} keeps something for a batch as a whole"
    return None


def chosen(
    schedule: str, method: Method | None, mesh: jax.sharding.Mesh | None, max_new_tokens: int, batch_size: int
) -> bool:
    """Whether answers are made by continuous batching: where it is possible and, for "auto", where it pays.

    Raises:
        LVLMError: no such schedule, or "continuous" where it is not possible.
    """
    if schedule not in SCHEDULES:
        raise LVLMError(f"schedule is {schedule!r}; expected one of {', '.join(SCHEDULES)}")
    why = None if schedule == "batches" else obstacle(method, mesh)
    if schedule == "continuous" and why:
        raise LVLMError(f"continuous batching is not possible: {why}; use the schedule batches")
    pays = batch_size > 1 and max_new_tokens > SHORT_ANSWER
    return schedule == "continuous" or (schedule == "auto" and why is None and pays)


class Numbered(NamedTuple):
    """A request and its place among all, from 0."""

    number: int
    conversation: Conversation
    seed: int


class Group(NamedTuple):
    """Prompts that were prefilled together; the last one also fills the places that are left."""

    requests: list[Numbered]
    inputs: Inputs
    state: State
    step: Step


class Scheduler:
    """Answers any number of requests in the rows of one batch.

    Attributes:
        rows: of the batch.
    """

    def __init__(
        self,
        params: dict,
        config: FamilyConfig,
        prepare: Callable[[list[Conversation]], Inputs],
        prefill: Callable[[Inputs], tuple[State, Step]],
        sampling: Sampling,
        stop: Iterable[int],
        limit: int,
        rows: int,
    ):
        """Nothing is computed yet.

        Args:
            prepare: lays out conversations; raises `LVLMError` for those that it cannot take.
            prefill: of prompts, without room for an answer.
            sampling: how tokens are chosen.
            stop: token ids that end an answer.
            limit: longest answer.

        Raises:
            LVLMError: a limit or a number of rows below one.
        """
        for name, value in (("max_new_tokens", limit), ("batch_size", rows)):
            if value < 1:
                raise LVLMError(f"{name} is {value}; expected at least 1")
        self.rows = rows
        self._params, self._config = params, config
        self._prepare, self._prefill = prepare, prefill
        self._sampling = sampling
        self._stop = np.asarray(tuple(stop) or (-1,), np.int32)
        self._context = config.text.max_position_embeddings
        self._limit = min(limit, self._context - 1)
        self._group = max(1, rows // ROWS_PER_GROUP)
        self._greedy = None if "sample" in sampling.rules else sample_keys(0, self._group)
        self._slots: continuous.Slots | None = None
        self._full = False  # whether the slots' columns are used up
        self._held: dict[int, Numbered] = {}  # by row

    def answers(self, requests: Iterable[Request]) -> Iterator[tuple[int, Found | LVLMError]]:
        """The number of each request, from 0, with its answer (a batch of one, host arrays) or what is wrong with it.

        In the order in which answers end. Requests are drawn as rows become free, one group ahead.
        """
        queue = (Numbered(number, *request) for number, request in enumerate(requests))
        ready: deque[tuple[int, Found | LVLMError]] = deque()
        coming = self._next(queue, ready)
        while coming or self._held:
            while coming and len(coming.requests) <= self.rows - len(self._held):
                self._place(coming)
                coming = self._next(queue, ready)
            if self._held:
                self._advance(len(coming.requests) if coming else self.rows)
            while ready:  # whatever is done with them is done while the device works
                yield ready.popleft()
            if self._held:
                ready += self._ended()
        yield from ready

    def _next(self, queue: Iterator[Numbered], ready: deque) -> Group | None:
        """The next prompts, prefilled; those that cannot be are `ready` with their faults."""
        while taken := list(itertools.islice(queue, self._group)):
            try:
                return self._prefilled(taken)
            except LVLMError:
                good = []
                for one in taken:
                    try:
                        self._prefilled([one])
                        good.append(one)
                    except LVLMError as error:
                        ready.append((one.number, error))
            if good:
                return self._prefilled(good)
        return None

    def _prefilled(self, requests: list[Numbered]) -> Group:
        filled = requests + requests[-1:] * (self._group - len(requests))
        inputs = self._prepare([request.conversation for request in filled])
        return Group(requests, inputs, *self._prefill(inputs))

    def _place(self, group: Group) -> None:
        logits = group.step.combined
        if self._slots is None:
            self._slots = continuous.empty(
                group.state, self._sampling, self._stop,
                batch=self.rows, limit=self._limit, vocabulary=logits.shape[1],
            )  # fmt: skip
        size = continuous.Size.of(self._slots.state, self._slots.prompt)
        needed = size.union(continuous.Size.of(group.state))
        if needed != size:
            self._slots = continuous.widen(self._slots, needed)
        free = [row for row in range(self.rows) if row not in self._held]
        rows = free[: len(group.requests)]
        self._held |= dict(zip(rows, group.requests, strict=True))
        spare = self._group - len(rows)
        seeds = [request.seed for request in group.requests]
        keys = self._greedy
        self._slots = continuous.place(
            self._slots,
            group.state,
            logits,
            group.inputs.tokens,
            sample_keys(seeds + seeds[-1:] * spare, self._group) if keys is None else keys,
            np.minimum(self._limit, self._context - group.inputs.lengths).astype(np.int32),
            np.asarray(rows + rows[-1:] * spare, np.int32),
        )

    def _advance(self, wanted: int) -> None:
        """Lets the device go on until so many rows are free."""
        if self._full:
            self._slots = continuous.compact(self._slots)
        self._slots = continuous.run(self._params, self._config, self._slots, jnp.int32(wanted))

    def _ended(self) -> list[tuple[int, Found]]:
        """Waits for the device, and takes the answers that have ended out of their rows."""
        slots = self._slots
        running, stopped, count, index = jax.device_get(
            (slots.running, slots.stopped, slots.count, slots.state.index)
        )
        self._full = bool(index >= slots.state.capacity)
        rows = [row for row in self._held if not running[row]]
        if not rows:
            return []
        tokens, logprobs = jax.device_get((slots.tokens, slots.logprobs))
        return [
            (
                self._held.pop(row).number,
                Found(*(array[row : row + 1] for array in (tokens, logprobs, count, stopped))),
            )
            for row in rows
        ]
