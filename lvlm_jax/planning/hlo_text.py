"""Parses the text of a compiled XLA module: computations, and their instructions."""

import math
import re
from typing import NamedTuple

_BYTES = {"pred": 1, "bf16": 2, "c64": 8, "token": 0}  # other types have their number of bits in the name
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')

Computations = dict[str, list["Instruction"]]


class Instruction(NamedTuple):
    """One operation: its name, result type, kind, operands, the rest of its line, and whether it is the root.

    The one operand of a parameter is its number.
    """

    name: str
    type: str
    operation: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def called(self) -> list[str]:
        """Computations that it calls."""
        branches = ",".join(_BRANCHES.findall(self.rest)).split(",")
        return _CALLED.findall(self.rest) + [name.strip().lstrip("%") for name in branches if name.strip()]


def computations(text: str) -> tuple[Computations, str]:
    """The computations of a module by name, callees before callers, and the name of the entry computation."""
    result: Computations = {}
    name = entry = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[2]
            result[name] = []
            entry = name if head[1] else entry
        elif parts := _INSTRUCTION.match(line):
            root, own, kind, operation, rest_of_line = parts.groups()
            inside, rest = _closed(rest_of_line)
            operands = (inside,) if operation == "parameter" else tuple(re.findall(r"%([\w.\-]+)", inside))
            result[name].append(Instruction(own, kind, operation, operands, rest, bool(root)))
    return result, entry


def runs(found: Computations, entry: str) -> dict[str, int]:
    """How often each computation runs in a run of the module; a loop of unknown length counts as one round."""
    # Callers come after the computations that they call, so in reverse order all callers are known.
    times = dict.fromkeys(found, 0) | {entry: 1}
    for name in reversed(found):
        for one in found[name] if times[name] else ():
            trips = _TRIPS.search(one.rest)
            for called in one.called:
                times[called] = times.get(called, 0) + times[name] * (int(trips[1]) if trips else 1)
    return times


def dimensions(kind: str) -> list[int]:
    """The shape of the first array in a type."""
    return [int(size) for size in _SHAPE.search(kind)[2].split(",") if size]


def sizes_of(kind: str) -> list[int]:
    """Bytes of each array in a type."""
    byte_counts = []
    for element, sizes in _SHAPE.findall(kind):
        size = _BYTES[element] if element in _BYTES else -(-int(re.search(r"\d+", element)[0]) // 8)
        byte_counts.append(size * math.prod(int(size) for size in sizes.split(",") if size))
    return byte_counts


def size_of(kind: str) -> int:
    """Bytes of all arrays in a type."""
    return sum(sizes_of(kind))


def _closed(behind: str) -> tuple[str, str]:
    """The text inside an operation's brackets, and the text after them."""
    depth = 1
    for index, letter in enumerate(behind):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return behind[:index], behind[index + 1 :]
    return behind, ""
