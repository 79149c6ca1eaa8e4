"""Schedules continuous batching on the host: decides which conversation gets which row, and when.

While the device decodes, the host lays out the next prompts and starts their prefill; answers are returned as they end.
A long prompt is run in chunks, and answers continue between them. Successive prompts share their common beginning.
Every answer equals the one that its conversation gets alone.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax import parallel
from lvlm_jax.errors import LVLMError, shown
from lvlm_jax.generation import branches, chunks, continuous, prefixes, searches
from lvlm_jax.generation.beam import Finished
from lvlm_jax.generation.host import ALONE, Host
from lvlm_jax.generation.output import Output
from lvlm_jax.generation.sampling import sample_keys
from lvlm_jax.generation.settings import Decoding, seed_of_request, whole_number
from lvlm_jax.methods import Method
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors.inputs import Conversation
from lvlm_jax.processors.layout import Inputs

SCHEDULES = ("auto", "continuous", "batches")
SHORT_ANSWER = 32  # tokens; with longer answers, lengths differ enough that rows would wait for each other
# A group of prompts that are prefilled together has one prompt for every 8 rows: larger groups keep rows idle, smaller
# ones read the weights more often.
ROWS_PER_GROUP = 8

BETWEEN_CHUNKS = 16  # tokens that each running answer gets between two chunks of a long prompt

Request = tuple[Conversation, int]  # a conversation with its random seed


def obstacle(method: Method | None, mesh: jax.sharding.Mesh | None) -> str | None:
    """Returns the reason why rows cannot be replaced one by one; None if they can be replaced."""
    if mesh is not None and mesh.is_multi_process:
        return "no process sees all rows of a batch that is spread over processes"
    if method is None:
        return None
    if reason := searches.obstacle(method):
        return reason
    if not (method.independent_rows and _remembers_by_row(method)):
        return f"{method.label} keeps something for a batch as a whole"
    return None


def _remembers_by_row(method: Method) -> bool:
    """Whether everything that a method keeps from step to step has an axis of rows."""

    def by_row(rows: int) -> bool:
        memory = jax.eval_shape(lambda: method.start(rows))
        return all(leaf.shape[:1] == (rows,) for leaf in jax.tree.leaves(memory))

    return by_row(2) and by_row(3)


def use_continuous(
    schedule: str, method: Method | None, mesh: jax.sharding.Mesh | None, max_new_tokens: int, batch_size: int
) -> bool:
    """Whether to use continuous batching; for "auto", this is so if continuous batching is possible and pays.

    Raises:
        LVLMError: an unknown schedule, "continuous" if that is not possible, or invalid numbers.
    """
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, low=1)
    batch_size = whole_number("batch_size", batch_size, low=1)
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        raise LVLMError(f"schedule is {shown(schedule)}; expected one of {', '.join(SCHEDULES)}")
    reason = None if schedule == "batches" else obstacle(method, mesh)
    if schedule == "continuous" and reason:
        raise LVLMError(f"continuous batching is not possible: {reason}; use the schedule batches")
    pays = batch_size > parallel.shards(mesh) and max_new_tokens > SHORT_ANSWER
    return schedule == "continuous" or (schedule == "auto" and reason is None and pays)


def generate_many(
    params: dict,
    config: FamilyConfig,
    prepare: Callable[[list[Conversation]], Inputs],
    requests: Iterable[Request],
    method: Method | None,
    decoding: Decoding,
    batch_size: int = 8,
    host: Host = ALONE,
) -> Iterator[tuple[int, Output | LVLMError]]:
    """Answers any number of conversations by continuous batching; arguments as in `Scheduler`.

    Returns:
        An iterator over request numbers (from 0) with the answer, equal to that of `answer.generate` for this request
        alone, or with the error; in the order in which answers end.

    Raises:
        LVLMError: see `Scheduler`; or `requests` is not a list of requests.
    """
    if not isinstance(requests, Iterable) or isinstance(requests, str | bytes):
        raise LVLMError(f"requests are {shown(requests)}; expected a list of conversations with their seeds")
    scheduler = Scheduler(params, config, prepare, method, decoding, batch_size, host)

    def output_of(answer: Finished | LVLMError) -> Output | LVLMError:
        if isinstance(answer, LVLMError):
            return answer
        try:
            return host.read(answer, decoding.stop)
        except LVLMError as error:  # only this answer failed
            return error

    return ((number, output_of(answer)) for number, answer in scheduler.answers(requests))


class NumberedRequest(NamedTuple):
    """A request and its number, from 0."""

    number: int
    conversation: Conversation
    seed: int


def _numbered(number: int, request: Any) -> NumberedRequest:
    if not isinstance(request, list | tuple) or len(request) != 2:
        raise LVLMError(f"request {number} is {shown(request)}; expected a conversation and its seed, as a pair")
    return NumberedRequest(number, *request)


class PrefilledGroup(NamedTuple):
    """Prompts that are prefilled together; the last prompt also fills the unused places."""

    requests: list[NumberedRequest]
    inputs: Inputs
    work: chunks.Prefill


class Scheduler:
    """Answers any number of requests in the rows of one batch.

    Attributes:
        rows: number of rows.
    """

    def __init__(
        self,
        params: dict,
        config: FamilyConfig,
        prepare: Callable[[list[Conversation]], Inputs],
        method: Method | None,
        decoding: Decoding,
        batch_size: int,
        host: Host = ALONE,
    ):
        """Prepares the scheduler; computes nothing yet.

        Args:
            prepare: lays out conversations; raises `LVLMError` for those that are malformed or too long.
            method: the method; None for plain decoding.
            decoding: how tokens are chosen, what ends an answer, and the longest answer.
            batch_size: number of rows.
            host: the devices, and the tokenizer for the words of a contrast branch.

        Raises:
            LVLMError: continuous batching is not possible (a search, or see `obstacle`), or the batch size is invalid.
        """
        if reason := searches.obstacle(method, decoding) or obstacle(method, host.mesh):
            raise LVLMError(f"continuous batching is not possible: {reason}; use generate")
        self.rows = whole_number("batch_size", batch_size, low=1)
        self._params, self._config, self._host = params, config, host
        self._prepare, self._method = prepare, method
        self._sampling = decoding.sampling
        self._stop = host.stops(config, decoding)
        self._context = config.text.max_position_embeddings
        self._limit = min(decoding.max_new_tokens, self._context - 1)
        shards = parallel.shards(host.mesh)
        self._group = max(1, self.rows // ROWS_PER_GROUP, shards if shards <= self.rows else 1)
        self._greedy = None if "sample" in self._sampling.rules else sample_keys(0, self._group)
        self._slots: continuous.Slots | None = None
        self._full = False  # whether all columns of the slots are used
        self._recent = prefixes.Recent()
        self._under_way: dict[int, NumberedRequest] = {}  # running requests, by row

    def answers(self, requests: Iterable[Request]) -> Iterator[tuple[int, Finished | LVLMError]]:
        """Yields the number of each request (from 0) with its answer (a batch of one, host arrays) or its error.

        Answers come in the order in which they end. Requests are read as rows become free, one group ahead.
        """
        queue = itertools.starmap(_numbered, enumerate(requests))
        results: deque[tuple[int, Finished | LVLMError]] = deque()
        coming = self._next(queue, results)
        while coming or self._under_way:
            while coming and coming.work.result and len(coming.requests) <= self.rows - len(self._under_way):
                self._place(coming)
                coming = self._next(queue, results)
            if self._under_way:
                self._advance(coming)
            if coming and not coming.work.result:
                self._step(coming)
            while results:  # the caller's work on results runs while the device decodes
                yield results.popleft()
            if self._under_way:
                results += self._ended()
        yield from results

    def _next(self, queue: Iterator[NumberedRequest], results: deque) -> PrefilledGroup | None:
        """Prefills the next prompts; errors of those that cannot be laid out are appended to `results`."""
        while requests := list(itertools.islice(queue, self._group)):
            try:
                return self._prefilled(requests)
            except LVLMError:
                good = []
                for one in requests:
                    try:
                        self._prefilled([one])
                        good.append(one)
                    except LVLMError as error:
                        results.append((one.number, error))
            if good:
                return self._prefilled(good)
        return None

    def _prefilled(self, requests: list[NumberedRequest]) -> PrefilledGroup:
        for request in requests:
            seed_of_request(request.seed)
        padded = requests + requests[-1:] * (self._group - len(requests))
        inputs = self._prepare([request.conversation for request in padded])
        model = self._params, self._config, inputs, self._method
        work = branches.begin_prefill(*model, 0, self._host, chunks.ROWS, recent=self._recent)
        group = PrefilledGroup(requests, inputs, work)
        self._step(group)
        return group

    def _step(self, group: PrefilledGroup) -> None:
        with parallel.ambient(self._host.mesh):
            group.work.step()

    def _place(self, group: PrefilledGroup) -> None:
        state, step = group.work.result
        logits = step.combined
        if self._slots is None:
            sizes = {"batch": self.rows, "limit": self._limit, "vocabulary": logits.shape[1]}
            self._slots = self._spread(continuous.empty(state, self._sampling, self._stop, **sizes))
        size = continuous.PromptSize.of(self._slots.state, self._slots.prompt)
        needed_size = size.union(continuous.PromptSize.of(state))
        if needed_size != size:
            self._slots = self._spread(continuous.widen(self._slots, needed_size))
        free = [row for row in range(self.rows) if row not in self._under_way]
        rows = free[: len(group.requests)]
        self._under_way |= dict(zip(rows, group.requests, strict=True))
        spare = self._group - len(rows)
        seeds = [request.seed for request in group.requests]
        keys = self._greedy
        self._slots = continuous.place(
            self._slots,
            state,
            logits,
            group.inputs.tokens,
            sample_keys(seeds + seeds[-1:] * spare, self._group) if keys is None else keys,
            np.minimum(self._limit, self._context - group.inputs.lengths).astype(np.int32),
            np.asarray(rows + rows[-1:] * spare, np.int32),
        )

    def _spread(self, slots: continuous.Slots) -> continuous.Slots:
        """Slots with rows and key heads spread over the mesh; the programs that follow leave them where they are."""
        mesh = self._host.mesh
        return slots if mesh is None else jax.device_put(slots, continuous.shardings(slots, mesh))

    def _advance(self, coming: PrefilledGroup | None) -> None:
        """Lets the device decode until there are free rows for the next group, or its next chunk is due."""
        if self._full:
            self._slots = continuous.compact(self._slots)
        free, steps = self.rows, self._slots.state.capacity
        if coming and coming.work.result:
            free = len(coming.requests)
        elif coming:
            steps = BETWEEN_CHUNKS
        self._slots = continuous.run(self._params, self._config, self._slots, jnp.int32(free), jnp.int32(steps))

    def _ended(self) -> list[tuple[int, Finished]]:
        """Waits for the device and removes finished answers from their rows."""
        slots = self._slots
        running, ended, count, index = jax.device_get((slots.running, slots.stopped, slots.count, slots.state.index))
        self._full = bool(index >= slots.state.capacity)
        rows = [row for row in self._under_way if not running[row]]
        if not rows:
            return []
        tokens, logprobs = jax.device_get((slots.tokens, slots.logprobs))
        fields = (tokens, logprobs, count, ended)
        return [
            (self._under_way.pop(row).number, Finished(*(field[row : row + 1] for field in fields))) for row in rows
        ]
