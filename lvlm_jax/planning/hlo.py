"""A module from XLA's compiler: its computations, their instructions, and how often each runs.

jaxlib's objects give computations, instructions and operands; types and attributes are only in their text.
"""

import math
import re
from typing import Any, NamedTuple

from lvlm_jax.attention import rounds

_BYTES = {"pred": 1, "bf16": 2, "c64": 8, "token": 0}  # other types have their bits in their name
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r" = (.*?) ([\w\-]+)\((.*)$", re.DOTALL)
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_NEAR = re.compile(r"S\([1-9]\d*\)")  # of a layout: memory on the chip, or the host's

Computations = dict[str, list["Instruction"]]


class Instruction(NamedTuple):
    """One operation of a computation.

    Attributes:
        name: its name.
        type: the type of its result.
        operation: the kind of operation.
        operands: names of its operands; for a parameter, its number.
        rest: the text of its operands and attributes.
        root: whether its result is that of the computation.
    """

    name: str
    type: str
    operation: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def called(self) -> list[str]:
        """The computations that the instruction runs."""
        if self.operation in ("async-update", "async-done"):  # their async-start has already run it
            return []
        branches = ",".join(_BRANCHES.findall(self.rest)).split(",")
        return _CALLED.findall(self.rest) + [name.strip().lstrip("%") for name in branches if name.strip()]

    @property
    def rounds(self) -> float | None:
        """How often a loop runs its body; None if the module does not say."""
        trips = _TRIPS.search(self.rest)
        return int(trips[1]) if trips else rounds.read(self.rest)


def of(compiled: Any) -> tuple[Computations, str]:
    """Applies `computations` to the module of a `jax.stages.Compiled`."""
    (module,) = compiled.runtime_executable().hlo_modules()
    return computations(module)


def computations(module: Any) -> tuple[Computations, str]:
    """The computations of an `HloModule` by their names, callees before callers, and the name of the first to run."""
    read = {one.name: _instructions(one) for one in module.computations()}
    ordered: Computations = {}

    def add(name: str) -> None:
        if name in ordered:
            return
        for one in read[name]:
            for called in one.called:
                add(called)
        ordered[name] = read[name]

    called = {name for instructions in read.values() for one in instructions for name in one.called}
    entry = max((name for name in read if name not in called), key=lambda name: len(read[name]))
    add(entry)
    return ordered, entry


def _instructions(computation: Any) -> list[Instruction]:
    parsed = computation.instructions()
    last = max((index for index, one in enumerate(parsed) if not one.users()), default=-1)
    instructions = []
    for index, one in enumerate(parsed):
        kind, operation, rest = _INSTRUCTION.search(one.to_string()).groups()
        number = (rest.partition(")")[0],)
        operands = number if operation == "parameter" else tuple(other.name for other in one.operands())
        instructions.append(Instruction(one.name, kind, operation, operands, rest, index == last))
    return instructions


def runs(by_name: Computations, entry: str) -> dict[str, float]:
    """How often each computation runs in a run of `entry`; a loop of unknown length counts as one round."""
    # A computation comes after those that it calls; so in reverse order, all callers of one are known before it.
    times = dict.fromkeys(by_name, 0.0) | {entry: 1.0}
    for name in reversed(by_name):
        for one in by_name[name] if times[name] else ():
            often = one.rounds if one.operation == "while" else None
            for called in one.called:
                times[called] += times[name] * (1 if often is None else often)
    return times


def round_of(by_name: Computations, entry: str) -> str:
    """The body of the largest loop of unknown length in a module; one round of it decodes one token."""
    bodies = [
        one.called
        for name, times in runs(by_name, entry).items()
        for one in (by_name[name] if times else ())
        if one.operation == "while" and one.rounds is None
    ]

    def length(name: str) -> int:
        return len(by_name[name])

    return max((max(called, key=length) for called in bodies), key=length, default=entry)


def dimensions(kind: str) -> list[int]:
    """The shape of the first array that a type names; empty for an empty tuple, as a conditional has."""
    shape = _SHAPE.search(kind)
    return [int(size) for size in shape[2].split(",") if size] if shape else []


def sizes_of(kind: str, far: bool = False) -> list[int]:
    """Bytes of each array that a type names; with `far`, 0 for an array outside the device's main memory."""
    byte_counts = []
    for element, sizes, layout in _SHAPE.findall(kind):
        size = _BYTES[element] if element in _BYTES else -(-int(re.search(r"\d+", element)[0]) // 8)
        near = far and _NEAR.search(layout)
        byte_counts.append(0 if near else size * math.prod(int(size) for size in sizes.split(",") if size))
    return byte_counts


def size_of(kind: str, far: bool = False) -> int:
    """Bytes of all arrays that a type names."""
    return sum(sizes_of(kind, far))
