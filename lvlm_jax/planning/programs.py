"""Compiled programs that nothing was allocated for: what one device would hold, compute, move and receive in a run.

Arguments are `jax.ShapeDtypeStruct`s with shardings. Two kinds of machines are compiled for, both by XLA's compiler for
CPUs, which is always there (those of TPUs and GPUs may be, see `compilers`):

- this CPU itself: the program that would run here, as it would;
- accelerators: products in 16 bits where the program says so (`double_width`), and an order of operations that holds
  little, as the schedulers of GPUs and TPUs seek it: XLA's own for the least memory, or that of `schedule`, whichever
  takes less. What XLA takes for CPUs by itself gathers every sharded weight at once, and has no use for recomputation.

What an accelerator's own compiler fuses, tiles or pads is not seen.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.extend import core

from lvlm_jax.planning import collectives, double_width, hlo_text, products, scattered_sums, schedule

LEAST_MEMORY = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    # Without its barriers a program that recomputes in its backward pass would do so long before.
    "xla_disable_hlo_passes": "cse_barrier_expander,cpu-all-reduce-combiner",
}


@dataclasses.dataclass(frozen=True)
class Program:
    """One program on one of the devices that run it.

    Attributes:
        name: what it is called.
        held: bytes in memory while it runs, by what they hold, but for temporaries.
        orders: bytes of temporaries, in each order of operations that was looked at.
        flops: of its products.
        moved: bytes that its memory must give or take at least: every argument that it uses and every result, once.
        received: bytes from other devices, as in `collectives.Messages`.
        count: how many messages.
    """

    name: str
    held: Mapping[str, float]
    orders: tuple[float, ...]
    flops: float
    moved: float
    received: Mapping[int, float]
    count: float

    @property
    def parts(self) -> dict[str, float]:
        """Bytes in memory, in the order that takes least."""
        return {**self.held, "temporaries": min(self.orders)}

    @property
    def total(self) -> float:
        """Bytes in memory."""
        return sum(self.parts.values())

    def extended(self, other: "Program", steps: float) -> "Program":
        """Where a figure grows as it does from here to `other`, what it is so many of these steps away from here."""

        def far(near: float, next_one: float) -> float:
            return near + (next_one - near) * steps

        def far_each(near: Mapping, next_one: Mapping) -> dict:
            keys = [*near, *(key for key in next_one if key not in near)]
            return {key: far(near.get(key, 0.0), next_one.get(key, 0.0)) for key in keys}

        return Program(
            self.name,
            far_each(self.held, other.held),
            tuple(far(*both) for both in zip(self.orders, other.orders, strict=True)),
            far(self.flops, other.flops),
            far(self.moved, other.moved),
            far_each(self.received, other.received),
            far(self.count, other.count),
        )


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says.

    Attributes:
        results: shapes, dtypes and shardings.
        kept: bytes of results that lie in an argument's place.
        orders, flops, messages: see `Program`.
    """

    results: Any
    kept: float
    orders: tuple[float, ...]
    flops: float
    messages: collectives.Messages

    @property
    def fresh(self) -> float:
        """Bytes of results in places of their own."""
        return size(self.results) - self.kept


def compile_for(
    traced: Any, arguments: Sequence[Any], devices: int, native: bool, donated: int | None = None, shardings: Any = None
) -> Compiled:
    """Compiles a traced function.

    Args:
        traced: of `jax.jit(...).trace`.
        arguments: its dynamic arguments in order, trees of shapes with shardings.
        devices: how many share the work.
        native: for this CPU; else for accelerators.
        donated: which of `arguments` is donated.
        shardings: of the results, where the function says so.
    """
    narrow = any(leaf.dtype in double_width.WIDER and leaf.dtype.itemsize == 2 for leaf in jax.tree.leaves(arguments))
    if native or not narrow:
        compiled = traced.lower().compile(compiler_options=None if native else LEAST_MEMORY)
        placed, scale = jax.tree.leaves(compiled.output_shardings), 1.0
    else:
        compiled = _compile_double_width(traced, arguments, donated, shardings)
        placed, scale = jax.tree.leaves(compiled.output_shardings), 0.5
    leaves, tree = jax.tree.flatten(traced.out_info)
    results = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for leaf, place in zip(leaves, placed, strict=True)
    ]
    memory = compiled.memory_analysis()
    found, entry = hlo_text.computations(compiled.as_text())
    found = found if native else scattered_sums.scattered(found)
    times, orders = hlo_text.runs(found, entry), [memory.temp_size_in_bytes]
    told = collectives.read(found, times, devices)
    if not native:
        orders.append(schedule.temporaries(found, entry))
    return Compiled(
        jax.tree.unflatten(tree, results),
        size(results) * memory.alias_size_in_bytes / max(1, memory.output_size_in_bytes),
        tuple(scale * order for order in orders),
        products.flops(found, times),
        collectives.Messages({reach: scale * one for reach, one in told.received.items()}, told.count),
    )


def _compile_double_width(traced: Any, arguments: Sequence[Any], donated: int | None, shardings: Any) -> Any:
    counts = [len(jax.tree.leaves(argument)) for argument in arguments]
    given = () if donated is None else range(sum(counts[:donated]), sum(counts[: donated + 1]))
    options = {} if shardings is None else {"out_shardings": _flat(shardings, traced.out_info)}
    leaves = [double_width.shape(leaf) for leaf in jax.tree.leaves(arguments)]
    function = core.jaxpr_as_fun(double_width.widened(traced.jaxpr))
    with jax.enable_x64(True):
        jitted = jax.jit(function, donate_argnums=tuple(given), compiler_options=LEAST_MEMORY, **options)
        return jitted.lower(*leaves).compile()


def _flat(shardings: Any, results: Any) -> list:
    """A sharding for each result, of one that may stand for many."""
    return jax.tree.leaves(
        jax.tree.map(
            lambda place, of: jax.tree.map(lambda _: place, of),
            shardings,
            results,
            is_leaf=lambda node: isinstance(node, jax.sharding.Sharding),
        )
    )


def size(tree: Any) -> float:
    """Bytes of a tree's arrays, or of their shapes, on one device; those without a sharding are whole on each."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def weights_read(params: Mapping[str, Any]) -> dict[str, Any]:
    """Of a model's parameters those that every token meets: a separate embedding table gives one row of itself."""
    decoder = dict(params["language_model"])
    if "lm_head" in decoder:
        del decoder["embed_tokens"]
    return decoder
