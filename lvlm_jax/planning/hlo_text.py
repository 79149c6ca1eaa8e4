"""The text of a module as XLA's compiler leaves it: computations, and what each of their instructions does."""

import math
import re
from typing import NamedTuple

_BYTES = {"pred": 1, "bf16": 2, "c64": 8, "token": 0}  # other types have their bits in their name
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')

Computations = dict[str, list["Instruction"]]


class Instruction(NamedTuple):
    """One operation: its name, the type of its result, what it does, on what, the rest of its line, is it the root.

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
        """Computations that it runs."""
        branches = ",".join(_BRANCHES.findall(self.rest)).split(",")
        return _CALLED.findall(self.rest) + [name.strip().lstrip("%") for name in branches if name.strip()]


def computations(text: str) -> tuple[Computations, str]:
    """The computations of a module by their names, callees before callers, and the name of the first to run."""
    found: Computations = {}
    name = entry = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[2]
            found[name] = []
            entry = name if head[1] else entry
        elif parts := _INSTRUCTION.match(line):
            root, own, kind, operation, behind = parts.groups()
            inside, rest = _closed(behind)
            operands = (inside,) if operation == "parameter" else tuple(re.findall(r"%([\w.\-]+)", inside))
            found[name].append(Instruction(own, kind, operation, operands, rest, bool(root)))
    return found, entry


def runs(found: Computations, entry: str) -> dict[str, int]:
    """How often each computation runs in a run of the module; a loop of unknown length counts as one round."""
    # A computation stands behind those that it calls, so from the last on all its callers are known.
    times = dict.fromkeys(found, 0) | {entry: 1}
    for name in reversed(found):
        for one in found[name] if times[name] else ():
            trips = _TRIPS.search(one.rest)
            for called in one.called:
                times[called] = times.get(called, 0) + times[name] * (int(trips[1]) if trips else 1)
    return times


def dimensions(kind: str) -> list[int]:
    """The shape of the first array that a type names."""
    return [int(size) for size in _SHAPE.search(kind)[2].split(",") if size]


def sizes_of(kind: str) -> list[int]:
    """Bytes of each array that a type names."""
    found = []
    for element, sizes in _SHAPE.findall(kind):
        size = _BYTES[element] if element in _BYTES else -(-int(re.search(r"\d+", element)[0]) // 8)
        found.append(size * math.prod(int(size) for size in sizes.split(",") if size))
    return found


def size_of(kind: str) -> int:
    """Bytes of all of them."""
    return sum(sizes_of(kind))


def _closed(behind: str) -> tuple[str, str]:
    """What stands inside an operation's brackets, and behind them."""
    depth = 1
    for index, letter in enumerate(behind):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return behind[:index], behind[index + 1 :]
    return behind, ""
