"""The memory for temporaries of a compiled program, in an order that an accelerator would choose.

The order of operations determines what must be in memory at the same time. XLA's CPU compiler orders for speed, or
depth first, which keeps the activations of all layers for weight gradients at the end, and gathers sharded weights long
before their use. So this module orders the program's operations again, greedily, like XLA's list scheduler. Among the
operations with available operands, it chooses the one that frees the most memory relative to what it allocates.
Operations that depend only on arguments, such as gathering a weight, run only when their result is needed. Barriers, on
which recomputation in the backward pass relies, are respected.
"""

import heapq
import itertools
import re
from typing import Any

from lvlm_jax.planning.hlo import Computations, Instruction, sizes_of

ALIASES = ("bitcast", "tuple", "get-tuple-element", "opt-barrier", "parameter", "constant")
RUNS = ("while", "conditional", "call")  # other operations inline the computations they call


def temporaries(computations: Computations, entry: str) -> int:
    """Peak bytes besides the arguments and results of a compiled module, parsed by `computations`."""
    reached = {entry}  # callers come after the computations that they call
    for name in reversed(computations):
        if name in reached:
            reached |= {called for one in computations[name] if one.operation in RUNS for called in one.called}
    inner: dict[str, int] = {}
    for name in computations:
        if name in reached:
            inner[name] = _Order(computations[name], inner).peak()
    return inner[entry]


class _Order:
    """The greedy order of a computation's operations."""

    def __init__(self, instructions: list[Instruction], inner: dict[str, int]):
        self._all = {one.name: one for one in instructions}
        self._place = {one.name: index for index, one in enumerate(instructions)}
        self._inner = inner
        self._values: dict[str, Any] = {}
        self._buffers: dict[str, list[int]] = {}  # buffers that an operation creates
        self._sizes: list[int] = []
        for one in instructions:
            self._values[one.name] = self._value(one)
        result_buffers = {buffer for one in instructions if one.root for buffer in _flat(self._values[one.name])}
        for buffer in result_buffers:  # results have their own memory
            self._sizes[buffer] = 0
        self._reads: dict[str, set[int]] = {}
        self._users: list[list[str]] = [[] for _ in self._sizes]
        for one in instructions:
            self._reads[one.name] = set()
            if one.operation not in ALIASES:
                read = {buffer for name in one.operands for buffer in _flat(self._values.get(name))}
                self._reads[one.name] = read
                for buffer in read:
                    self._users[buffer].append(one.name)
        self._lazy: set[str] = set()
        self._before: dict[str, list[str]] = {}  # lazy operations that an operation depends on, in order
        for one in instructions:
            if self._is_lazy(one):
                self._lazy.add(one.name)
            rests = ((*self._before[name], name) for name in one.operands if name in self._lazy)
            self._before[one.name] = list(dict.fromkeys(itertools.chain(*rests)))

    def peak(self) -> int:
        """Peak bytes when all operations run in this order."""
        needs = {name: self._needs(name) for name in self._all if name not in self._lazy}
        waiting = {name: len(before) for name, before in needs.items()}
        followers: dict[str, list[str]] = {}
        for name, before in needs.items():
            for other in before:
                followers.setdefault(other, []).append(name)
        users_left = [len(users) for users in self._users]
        frees = dict.fromkeys(self._all, 0)
        for buffer, users in enumerate(self._users):
            if len(users) == 1:
                frees[users[0]] += self._sizes[buffer]
        finished: set[str] = set()
        available: list[tuple[int, int, str]] = []
        live = highest = 0

        def offer(name: str) -> None:
            takes = self._takes(name) + sum(self._takes(one) for one in self._pending(name, finished))
            heapq.heappush(available, (takes - frees[name], self._place[name], name))

        def run(name: str) -> None:
            nonlocal live, highest
            finished.add(name)
            takes = self._takes(name)
            one = self._all[name]
            inside = max((self._inner[other] for other in one.called), default=0) if one.operation in RUNS else 0
            dying = [buffer for buffer in self._reads[name] if users_left[buffer] == 1]
            freed_bytes = sum(self._sizes[buffer] for buffer in dying)
            in_place = "kind=kLoop" in one.rest and any(self._sizes[buffer] == takes for buffer in dying)
            highest = max(highest, live + inside + (0 if in_place else takes))
            live += takes - freed_bytes
            live -= sum(self._sizes[buffer] for buffer in self._buffers.get(name, ()) if not users_left[buffer])
            for buffer in self._reads[name]:
                users_left[buffer] -= 1
                if users_left[buffer] == 1:
                    (last,) = (user for user in self._users[buffer] if user not in finished)
                    frees[last] += self._sizes[buffer]
                    if last in waiting and not waiting[last]:
                        offer(last)
            for other in followers.get(name, ()):
                waiting[other] -= 1
                if not waiting[other]:
                    offer(other)

        for name, count in waiting.items():
            if not count:
                offer(name)
        while available:
            name = heapq.heappop(available)[-1]
            if name in finished:
                continue
            for one in self._pending(name, finished):
                run(one)
            run(name)
        return highest

    def _value(self, one: Instruction) -> Any:
        """The buffers of a result: a number, a list for a tuple, or None for an argument."""
        first = self._values.get(one.operands[0]) if one.operands else None
        if one.operation in ("bitcast", "opt-barrier", "while"):
            return first
        if one.operation == "tuple":
            return [self._values.get(name) for name in one.operands]
        if one.operation == "get-tuple-element":
            index = int(re.search(r"index=(\d+)", one.rest)[1])
            return first[index] if isinstance(first, list) else first
        if one.operation in ("parameter", "constant"):
            return None
        start = len(self._sizes)
        self._sizes += sizes_of(one.type)
        new_buffers = list(range(start, len(self._sizes)))
        self._buffers[one.name] = new_buffers
        return new_buffers if one.type.startswith("(") else new_buffers[0]

    def _is_lazy(self, one: Instruction) -> bool:
        """Whether an operation depends only on arguments, directly or indirectly."""
        has_result = one.operands and one.name in self._buffers and not one.root
        read = (name for name in one.operands if _flat(self._values.get(name)))
        return bool(has_result) and all(name in self._lazy for name in read)

    def _needs(self, name: str) -> set[str]:
        """Operations that must run before; for lazy operations, their own requirements."""
        return {
            operand
            for one in (name, *self._before[name])
            for operand in self._all[one].operands
            if operand in self._all and operand not in self._lazy
        }

    def _pending(self, name: str, done: set[str]) -> list[str]:
        """Lazy operations that an operation depends on and that have not run yet, in order."""
        return [one for one in self._before[name] if one not in done]

    def _takes(self, name: str) -> int:
        return sum(self._sizes[buffer] for buffer in self._buffers.get(name, ()))


def _flat(value: Any) -> list[int]:
    if isinstance(value, list):
        return [buffer for one in value for buffer in _flat(one)]
    return [] if value is None else [value]
