"""Counts the FLOPs of products in a compiled program, from its text.

XLA's own count (`cost_analysis`) counts a loop as one round, and includes elementwise operations, which cost an
accelerator no time beside the memory that it reads.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from lvlm_jax.native.build import TARGET
from lvlm_jax.planning import hlo_text
from lvlm_jax.planning.hlo_text import Computations, Instruction, dimensions

_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_OURS = f'custom_call_target="{TARGET}"'
_KERNEL = re.compile(r"dim_labels=\w+_(\w+)->")


def flops_of(compiled: Any) -> float:
    """FLOPs of a whole program on one device; a loop of unknown length counts as one round."""
    found, entry = hlo_text.computations(compiled.as_text())
    return flops(found, hlo_text.runs(found, entry))


def flops(found: Computations, times: Mapping[str, int]) -> float:
    """Two FLOPs per multiplied pair of numbers; arguments as in `collectives.read`."""
    total = 0.0
    for name, instructions in found.items():
        if not times[name]:
            continue
        types = {one.name: one.type for one in instructions}
        total += times[name] * sum(2.0 * math.prod(dimensions(one.type)) * _terms(one, types) for one in instructions)
    return total


def _terms(one: Instruction, types: Mapping[str, str]) -> int:
    """Number of multiplications per element of the result; 0 if the operation is not a product."""
    if one.operation == "dot":
        left_shape, along = dimensions(types[one.operands[0]]), _CONTRACTED.search(one.rest)
        return math.prod(left_shape[int(axis)] for axis in along[1].split(",") if axis) if along else 1
    if one.operation == "custom-call" and _OURS in one.rest:
        return dimensions(types[one.operands[0]])[-1]
    if one.operation == "convolution":
        kernel = dimensions(types[one.operands[1]])
        return math.prod(kernel) // kernel[_KERNEL.search(one.rest)[1].index("o")]
    return 0
