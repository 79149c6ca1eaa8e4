"""Sums over devices of which each device uses only a slice, such as gradients of sharded weights.

The compilers of GPUs and TPUs merge sum and slice into one message (XLA's `reduce-scatter-creator`), so that no device
has the whole sum. The CPU compiler does not; it fuses the slices into their users, which keeps the whole sums of all
layers until the end.
"""

import math

from lvlm_jax.planning.hlo import Computations, Instruction, dimensions

# Operations that may come between a sum and its slice.
_BETWEEN = ("bitcast", "convert", "copy")
WHOLE = 0


def scattered(computations: Computations) -> Computations:
    """Replaces sums that devices only use in slices by `reduce-scatter`."""
    return {
        name: [_replaced(one, instructions, computations) for one in instructions]
        for name, instructions in computations.items()
    }


def _replaced(one: Instruction, instructions: list[Instruction], computations: Computations) -> Instruction:
    if one.operation != "all-reduce" or one.type.startswith("("):
        return one
    counts = _element_counts(one.name, instructions, computations)
    if len(counts) != 1 or WHOLE in counts:
        return one
    return one._replace(operation="reduce-scatter", type=f"{one.type.partition('[')[0]}[{counts.pop()}]")


def _element_counts(name: str, instructions: list[Instruction], computations: Computations) -> set[int]:
    """How many elements of a value its users need; WHOLE for a user that needs all."""
    counts: set[int] = set()
    for user in instructions:
        for place, operand in enumerate(user.operands):
            if operand != name:
                continue
            if user.operation == "fusion":
                inside = computations[user.called[0]]
                operand_number = (str(place),)
                own = next(one for one in inside if one.operation == "parameter" and one.operands == operand_number)
                counts |= _element_counts(own.name, inside, computations)
            elif user.operation in _BETWEEN and not user.root:
                counts |= _element_counts(user.name, instructions, computations)
            elif user.operation == "dynamic-slice" and place == 0:
                counts.add(math.prod(dimensions(user.type)))
            else:
                counts.add(WHOLE)
    return counts
