"""Counts the FLOPs of products in a compiled program.

XLA's own count (`cost_analysis`) counts a loop as one round, and includes elementwise operations, which cost an
accelerator no time beside the memory that it reads.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lvlm_jax.attention import rounds
from lvlm_jax.attention.stream import CPU_BLOCK
from lvlm_jax.native.build import ATTENTION, ATTENTION_GRADIENT, TARGET, TILES
from lvlm_jax.planning import hlo
from lvlm_jax.planning.hlo import Computations, Instruction, dimensions

_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_OURS = re.compile(f'custom_call_target="({TARGET}|{TILES})"')
_OF_CUBLAS = re.compile(r'custom_call_target="__cublas.*"lhs_contracting_dimensions":\[([\d",]*)\]')
_OF_CUDNN = 'custom_call_target="__cudnn$conv'
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW_OF = re.compile(r"window=\{(.*?)\}")
_SPLASH = re.compile(r"splash_mha_(fwd|dkv|dq)")
_NATIVE = re.compile(f'custom_call_target="({ATTENTION}|{ATTENTION_GRADIENT})"')
_ATTENTION = re.compile(r'custom_call_target="__cudnn\$fmha\w*?(Backward)?"')
_WINDOW = re.compile(r'"sliding_window_length":"?([1-9]\d*)')


def flops_of(compiled: Any) -> float:
    """FLOPs of a whole program on one device; a loop of unknown length counts as one round."""
    computations, entry = hlo.of(compiled)
    return flops(computations, hlo.runs(computations, entry))


def flops(computations: Computations, times: Mapping[str, float]) -> float:
    """Two FLOPs per multiplied pair of numbers; arguments as in `collectives.read`."""
    total = 0.0
    for name, instructions in computations.items():
        if not times[name]:
            continue
        types = {one.name: one.type for one in instructions}
        sums = {one.name: _summed(one, instructions, computations) for one in instructions if one.operation == "reduce"}
        total += times[name] * sum(
            sums.get(one.name) or _of_attention(one, types) or 2 * math.prod(dimensions(one.type)) * _terms(one, types)
            for one in instructions
        )
    return total


def _summed(one: Instruction, instructions: list[Instruction], computations: Computations) -> float:
    """FLOPs of a sum of products, as accelerators compute products of a single row; 0 for another reduction."""
    (how,), own = one.called, {other.name: other for other in instructions}
    factors = own[one.operands[0]]
    while factors.operation in ("bitcast", "convert", "reshape") and factors.operands:
        factors = own[factors.operands[0]]
    is_sum = any(other.root and other.operation == "add" for other in computations[how])
    return 2.0 * math.prod(dimensions(factors.type)) if is_sum and factors.operation == "multiply" else 0


def _of_attention(one: Instruction, types: Mapping[str, str]) -> float:
    """FLOPs of attention by our kernel, cuDNN's or splash attention, from the operands' shapes; 0 for any other
    operation."""
    if one.operation != "custom-call":
        return 0
    if ours := _NATIVE.search(one.rest):
        query = dimensions(types[one.operands[0]])
        return (4.0 if ours[1] == ATTENTION else 10.0) * math.prod(query) * (rounds.read(one.rest) or 0) * CPU_BLOCK
    if splash := _SPLASH.match(one.name):  # its text does not give the mask; we assume a causal one
        query = next(shape for name in one.operands if len(shape := dimensions(types[name])) > 2 and shape[-1] > 2)
        return {"fwd": 2.0, "dkv": 4.0, "dq": 3.0}[splash[1]] * math.prod(query) * query[-2]
    if not (kernel := _ATTENTION.search(one.rest)):
        return 0
    query = dimensions(types[one.operands[0]])
    columns = length = max(query[1:3])
    if "CAUSAL" in one.rest:
        columns = min(length / 2, float(window[1]) if (window := _WINDOW.search(one.rest)) else length)
    return (10.0 if kernel[1] else 4.0) * math.prod(query) * columns


def _terms(one: Instruction, types: Mapping[str, str]) -> float:
    """Number of multiplications per element of the result; 0 if the operation is not a product."""
    if one.operation == "dot":
        left_shape, along = dimensions(types[one.operands[0]]), _CONTRACTED.search(one.rest)
        return math.prod(left_shape[int(axis)] for axis in along[1].split(",") if axis) if along else 1
    if one.operation == "custom-call" and _OURS.search(one.rest):
        return dimensions(types[one.operands[0]])[-1]
    if one.operation == "custom-call" and (along := _OF_CUBLAS.search(one.rest)):
        left_shape = dimensions(types[one.operands[0]])
        return math.prod(left_shape[int(axis)] for axis in re.findall(r"\d+", along[1]))
    if one.operation == "convolution" or _OF_CUDNN in one.rest:
        return _of_convolution(one, *(dimensions(types[name]) for name in one.operands[:2]))
    return 0


def _of_convolution(one: Instruction, image: list[int], kernel: list[int]) -> float:
    """Multiplications per element of the result, without those by padding."""
    of_image, of_kernel, of_result = _LABELS.search(one.rest).groups()
    result, terms = dimensions(one.type), float(kernel[of_kernel.index("i")])
    written = _WINDOW_OF.search(one.rest)
    window = dict(part.split("=") for part in (written[1].split() if written else ()))
    for axis in (letter for letter in of_result if letter.isdigit()):
        place, size, taps = int(axis), result[of_result.index(axis)], kernel[of_kernel.index(axis)]

        def number(name: str, place: int = place) -> int:
            return int(window[name].split("x")[place].split("_")[0]) if name in window else name != "pad"

        output, tap = np.ogrid[:size, :taps]
        at = output * number("stride") + tap * number("rhs_dilate") - number("pad")
        inside = (at >= 0) & (at <= (image[of_image.index(axis)] - 1) * number("lhs_dilate"))
        terms *= (inside & (at % number("lhs_dilate") == 0)).sum() / size
    return terms
