"""Bytes that a compiled program moves between a device's memory and its arithmetic.

Every operation reads its operands and writes its result; intermediate results of a fusion are free. If an operand is
only sliced, only the slices count; if an array is updated in place, only the update. Arrays in memory on the chip (VMEM
of a TPU) are free.
"""

import re
from collections.abc import Mapping

from lvlm_jax.native.build import COLUMNS
from lvlm_jax.planning.collectives import OPERATIONS
from lvlm_jax.planning.hlo import Computations, Instruction, size_of

# Operations that move no data of their own; those of loops and calls are counted in their computations.
_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "while", "conditional", "call",
    "partition-id", "replica-id", "after-all", "add-dependency", "iota", "async-update", "domain",
)  # fmt: skip
_SAME = ("bitcast", "copy", "convert", "reshape", "tuple", "get-tuple-element")
_SLICES = ("dynamic-slice", "slice", "gather")
_FUSED = "fusion"
_PRODUCTS = ("dot", "convolution", "custom-call")


def moved(computations: Computations, times: Mapping[str, float], only_products: bool = False) -> float:
    """Bytes in all rounds; arguments as in `collectives.read`.

    Args:
        only_products: counts products alone, for a stand-in that fuses less than an accelerator's compiler.
    """
    inside = {name for instructions in computations.values() for one in instructions for name in _worked_in(one)}
    total = 0.0
    for name, instructions in computations.items():
        if times[name] and name not in inside:
            sizes = {one.name: size_of(_result(one), far=True) for one in instructions}
            ends = {one.operands[0]: one for one in instructions if one.operation.endswith("-done")}
            counted = (one for one in instructions if _is_product(one) or not only_products)
            total += times[name] * sum(_bytes(one, sizes, ends, computations) for one in counted)
    return total


def _is_product(one: Instruction) -> bool:
    return one.operation in _PRODUCTS and not _writes_columns(one)


def _writes_columns(one: Instruction) -> bool:
    """Whether the operation writes columns of a cache in place, as CPUs do."""
    return one.operation == "custom-call" and f'custom_call_target="{COLUMNS}"' in one.rest


def _result(one: Instruction) -> str:
    """The type of a result, without the workspace of a library's product."""
    room = one.operation == "custom-call" and one.type.startswith("(")
    return re.sub(r"\b[su]8\[\d+\]", "s8[0]", one.type) if room else one.type


def _worked_in(one: Instruction) -> list[str]:
    """Computations inside an operation: those of a fusion, and the function that a reduction or a sort applies."""
    return [] if one.operation in ("while", "conditional", "call", "async-start") else one.called


def _bytes(
    one: Instruction, sizes: Mapping[str, int], ends: Mapping[str, Instruction], computations: Computations
) -> float:
    operation = one.operation
    if operation in _FREE or operation.endswith("-done"):
        return 0
    read, written = [sizes.get(name, 0) for name in one.operands], sizes[one.name]
    if operation in _SLICES:
        return 2 * written
    if operation == "dynamic-update-slice" or _writes_columns(one):
        return 2 * read[1]
    if operation == "scatter":
        return 3 * read[-1]
    if operation.endswith("-start"):
        result = ends[one.name].type
        message = operation.removesuffix("-start") in OPERATIONS
        # A copy to or from the chip may be of a slice.
        return (sum(read) if message else size_of(result) if any(read) else 0) + size_of(result, far=True)
    if operation == _FUSED:
        return _of_fusion(one, read, written, computations[one.called[0]])
    return sum(read) + written


def _of_fusion(one: Instruction, read: list[int], written: int, inside: list[Instruction]) -> float:
    own = {other.name: other for other in inside}
    users: dict[str, list[tuple[Instruction, int]]] = {}
    for other in inside:
        for place, name in enumerate(other.operands if other.operation != "parameter" else ()):
            users.setdefault(name, []).append((other, place))

    def of_result(name: str) -> float:
        producer, before = own[name], name
        while own[before].operation in _SAME and len(own[before].operands) == 1:
            before = own[before].operands[0]
        if own[before].operation == "dynamic-update-slice":
            return size_of(own[own[before].operands[1]].type)
        if producer.operation == "tuple":
            return sum(of_result(one) for one in producer.operands)
        return size_of(producer.type)

    def of_operand(name: str, whole: int) -> float:
        total = 0.0
        for user, place in users.get(name, ()):
            if user.operation in _SLICES and place == 0:
                total += size_of(user.type)
            elif user.operation == "dynamic-update-slice" and place == 0:
                continue
            elif user.operation in _SAME and not user.root:
                total += of_operand(user.name, whole)
            else:
                return whole
        return min(total, whole)

    root = next(other for other in inside if other.root)
    # The layouts inside a fusion do not say in which memory the result lies.
    result = min(of_result(root.name), written)
    numbered = {int(other.operands[0]): other.name for other in inside if other.operation == "parameter"}
    return result + sum(of_operand(numbered[place], whole) for place, whole in enumerate(read))
