"""Counts the data that devices send to each other in a compiled program."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from lvlm_jax.planning.hlo import Computations, Instruction, size_of

OPERATIONS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_STRIDED = re.compile(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH = re.compile(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\))\))? \{(.*?)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(.*?)\}\}")
_ARRANGED = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")


class Messages(NamedTuple):
    """The data that one device receives in a run of a program; loops of unknown length count as one round.

    Attributes:
        received: bytes, by the size of the block of devices that exchange them. Ring algorithms are assumed: a gather
            receives the parts of the other devices, a sum twice as much.
        count: number of messages.
    """

    received: dict[int, float]
    count: float


def read(computations: Computations, times: Mapping[str, float], devices: int) -> Messages:
    """The data that one device of a partitioned module receives.

    Args:
        computations, times: see `hlo.computations` and `hlo.runs`.
        devices: how many devices run it.
    """
    received: dict[int, float] = {}
    count = 0.0
    for name, instructions in computations.items():
        # An asynchronous message has two instructions: the result of the first also contains the operand.
        ends = {one.operands[0]: one for one in instructions if one.operation.endswith("-done")}
        for one in instructions if times[name] else ():
            operation = one.operation.removesuffix("-start")
            if operation not in OPERATIONS:
                continue
            group = _group(one, devices)
            result = size_of(ends.get(one.name, one).type)
            if size := _received(operation, result, len(group)) * times[name]:
                reach = max(group) + 1
                received[reach] = received.get(reach, 0.0) + size
                count += times[name]
    return Messages(received, count)


def _received(operation: str, result: int, group: int) -> float:
    """Bytes that reach one of `group` devices, given the bytes of its result."""
    others = (group - 1) / group
    if operation == "all-reduce":
        return 2 * result * others
    if operation == "reduce-scatter":
        return result * (group - 1)
    return result if operation.startswith("collective") else result * others


def _group(one: Instruction, devices: int) -> list[int]:
    """The devices that exchange data with device 0 in an operation; all if the text does not say."""
    if groups := _LISTED.search(one.rest):
        return [int(device) for device in groups[1].split(",")]
    if groups := _STRIDED.search(one.rest):
        return _arranged(groups[1])[0].tolist()
    if groups := _MESH.search(one.rest):
        axes = re.findall(r"'(.*?)'=(\d+)", groups[1])
        mesh = _arranged(groups[2]).reshape(-1) if groups[2] else np.arange(math.prod(int(n) for _, n in axes))
        mesh = mesh.reshape([int(size) for _, size in axes])
        along = re.findall(r"'(.*?)'", groups[3])
        return mesh[tuple(slice(None) if axis in along else 0 for axis, _ in axes)].reshape(-1).tolist()
    if groups := _PAIRS.search(one.rest):
        return sorted({int(device) for device in re.findall(r"\d+", groups[1])})
    return list(range(devices))


def _arranged(text: str) -> np.ndarray:
    """Parses XLA's notation for devices: `[2,4]<=[4,2]T(1,0)`, or `[4,2]T(1,0)` for all devices in order."""

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    shape, source, order = _ARRANGED.match(text).groups()
    devices = np.arange(math.prod(numbers(source or shape))).reshape(numbers(source or shape))
    devices = devices.transpose(numbers(order)) if order else devices
    return devices.reshape(numbers(shape)) if source else devices
