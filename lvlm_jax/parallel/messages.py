"""What a compiled program has devices send to one another, read from its text."""

import math
import re
from typing import NamedTuple

import numpy as np

SIZES = {"pred": 1, "bf16": 2, "c64": 8, "token": 0}  # bytes; other types have their bits in their name
OPERATIONS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"

_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) .*\{$")
_MESSAGE = re.compile(rf" = (.*?) ({OPERATIONS})(?:-start)?\(")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_STRIDED = re.compile(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH = re.compile(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\))\))? \{(.*?)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(.*?)\}\}")
_ARRANGED = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")


class Messages(NamedTuple):
    """What one device receives in a run of a program; loops whose length is not known run once.

    Attributes:
        received: bytes, by reach: the devices that exchange them lie in one block of so many devices. Algorithms on
            rings are assumed: a gather brings what the others have, a sum twice as much.
        count: how many messages.
    """

    received: dict[int, float]
    count: float


def read(text: str, devices: int) -> Messages:
    """Reads the text of a compiled (partitioned) module that runs on so many devices."""
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[1]
            entry = name if line.startswith("ENTRY") else entry
        computations.setdefault(name, []).append(line)
    # A computation stands behind those that it calls, so from the last on all its callers are known.
    runs = dict.fromkeys(computations, 0) | {entry: 1}
    received: dict[int, float] = {}
    count = 0.0
    for name, lines in reversed(computations.items()):
        for line in lines if runs[name] else ():
            for called, times in _calls(line):
                runs[called] = runs.get(called, 0) + times * runs[name]
            if found := _MESSAGE.search(line):
                group = _group(line, devices)
                size = _received(found[2], _bytes(found[1]), len(group)) * runs[name]
                if size:
                    reach = max(group) + 1
                    received[reach] = received.get(reach, 0.0) + size
                    count += runs[name]
    return Messages(received, count)


def _calls(line: str) -> list[tuple[str, int]]:
    called = [(name, 1) for name in _CALLED.findall(line)]
    for names in _BRANCHES.findall(line):
        called += [(name.strip().lstrip("%"), 1) for name in names.split(",")]
    trips = _TRIPS.search(line)
    return [(name, int(trips[1])) for name, _ in called] if trips else called


def _bytes(shapes: str) -> int:
    """Of the arrays that a type names."""
    total = 0
    for kind, sizes in _SHAPE.findall(shapes):
        bits = re.search(r"\d+", kind)
        size = SIZES[kind] if kind in SIZES else int(bits[0]) // 8
        total += size * math.prod(int(size) for size in sizes.split(",") if size)
    return total


def _received(operation: str, result: int, group: int) -> float:
    """Bytes that reach one of `group` devices, from those of its result."""
    others = (group - 1) / group
    if operation == "all-reduce":
        return 2 * result * others
    if operation == "reduce-scatter":
        return result * (group - 1)
    return result if operation.startswith("collective") else result * others


def _group(line: str, devices: int) -> list[int]:
    """The devices that exchange something with device 0 in an operation; all, where the text does not say."""
    if found := _LISTED.search(line):
        return [int(device) for device in found[1].split(",")]
    if found := _STRIDED.search(line):
        return _arranged(found[1])[0].tolist()
    if found := _MESH.search(line):
        axes = re.findall(r"'(.*?)'=(\d+)", found[1])
        mesh = _arranged(found[2]).reshape(-1) if found[2] else np.arange(math.prod(int(n) for _, n in axes))
        mesh = mesh.reshape([int(size) for _, size in axes])
        along = re.findall(r"'(.*?)'", found[3])
        return mesh[tuple(slice(None) if axis in along else 0 for axis, _ in axes)].reshape(-1).tolist()
    if found := _PAIRS.search(line):
        return sorted({int(device) for device in re.findall(r"\d+", found[1])})
    return list(range(devices))


def _arranged(text: str) -> np.ndarray:
    """Devices as XLA writes them: `[2,4]<=[4,2]T(1,0)` or, of all in their order first, `[4,2]T(1,0)`."""

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    shape, source, order = _ARRANGED.match(text).groups()
    devices = np.arange(math.prod(numbers(source or shape))).reshape(numbers(source or shape))
    devices = devices.transpose(numbers(order)) if order else devices
    return devices.reshape(numbers(shape)) if source else devices
