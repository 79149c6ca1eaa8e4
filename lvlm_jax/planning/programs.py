"""Compiled programs without allocation: what one device would store, compute, move and receive in a run.

Arguments are `jax.ShapeDtypeStruct`s with shardings. The target's own compiler compiles them if it is installed
(`compilers`); otherwise XLA's CPU compiler does, which is always available, in one of two ways:

- for this CPU: the program that would run here, unchanged;
- as a stand-in for an accelerator's: with 16-bit products (`double_width`), and with an order of operations that needs
  little memory, as on GPUs and TPUs (XLA's memory-minimising order or that of `schedule`, whichever takes less). XLA's
  default order for CPUs gathers all sharded weights at once, and makes recomputation useless. Fusion, tiling and
  padding of an accelerator's own compiler are not modelled.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.extend import core

from lvlm_jax.planning import collectives, compilers, double_width, hlo, products, scattered_sums, schedule, traffic

LEAST_MEMORY = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    # Without these barriers, a program that recomputes in its backward pass would do so much too early.
    "xla_disable_hlo_passes": "cse_barrier_expander,cpu-all-reduce-combiner",
}


@dataclasses.dataclass(frozen=True)
class Program:
    """The memory, the work and the messages of one program on one of its devices.

    Attributes:
        name: name of the program.
        contents: bytes in memory while it runs, by kind, without temporaries.
        orders: bytes of temporaries, for each order of operations.
        flops: FLOPs of its products.
        moved: bytes to and from memory: `traffic`, or every used argument and every result once, if that is more.
        received: bytes from other devices, as in `collectives.Messages`.
        count: number of messages.
    """

    name: str
    contents: Mapping[str, float]
    orders: tuple[float, ...]
    flops: float
    moved: float
    received: Mapping[int, float]
    count: float

    @property
    def parts(self) -> dict[str, float]:
        """Bytes in memory by content, under the order of operations that takes the least memory."""
        return {**self.contents, "temporaries": min(self.orders)}

    @property
    def total(self) -> float:
        """Bytes in memory."""
        return sum(self.parts.values())

    def extended(self, other: "Program", steps: float) -> "Program":
        """Extrapolates every figure: `steps` times the change from this program to `other`."""

        def far(near: float, next_one: float) -> float:
            return near + (next_one - near) * steps

        def far_each(near: Mapping, next_one: Mapping) -> dict:
            keys = [*near, *(key for key in next_one if key not in near)]
            return {key: far(near.get(key, 0.0), next_one.get(key, 0.0)) for key in keys}

        return Program(
            self.name,
            far_each(self.contents, other.contents),
            tuple(far(*pair) for pair in zip(self.orders, other.orders, strict=True)),
            far(self.flops, other.flops),
            far(self.moved, other.moved),
            far_each(self.received, other.received),
            far(self.count, other.count),
        )


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's results.

    Attributes:
        results: shapes, dtypes and shardings.
        reused: bytes of results that reuse an argument's memory.
        orders, flops, moved, messages: see `Program`.
    """

    results: Any
    reused: float
    orders: tuple[float, ...]
    flops: float
    moved: float
    messages: collectives.Messages

    @property
    def fresh(self) -> float:
        """Bytes of results with new memory."""
        return size(self.results) - self.reused


def compile_for(
    traced: Any,
    arguments: Sequence[Any],
    devices: int,
    target: str,
    donated: int | None = None,
    shardings: Any = None,
    per_round: bool = False,
) -> Compiled:
    """Compiles a traced function.

    Args:
        traced: from `jax.jit(...).trace`.
        arguments: its dynamic arguments in order, trees of shapes with shardings.
        devices: how many devices share the work.
        target: one of `compilers.TARGETS`.
        donated: index of the donated argument.
        shardings: of the results, if the function defines them.
        per_round: the program is a loop of unknown length; counts one round of it, and nothing outside the loop.
    """
    narrow = any(leaf.dtype in double_width.WIDER and leaf.dtype.itemsize == 2 for leaf in jax.tree.leaves(arguments))
    scale, stand_in = 1.0, target == compilers.STAND_IN
    if stand_in and narrow:
        compiled, scale = _compile_double_width(traced, arguments, donated, shardings), 0.5
    else:
        options = LEAST_MEMORY if stand_in else dict(compilers.options(target))
        compiled = traced.lower().compile(compiler_options=options)
    result_shardings = jax.tree.leaves(compiled.output_shardings)
    leaves, tree = jax.tree.flatten(traced.out_info)
    results = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        for leaf, place in zip(leaves, result_shardings, strict=True)
    ]
    memory = compiled.memory_analysis()
    computations, entry = hlo.of(compiled)
    orders = [memory.temp_size_in_bytes]
    if stand_in:
        computations = scattered_sums.scattered(computations)
        orders.append(schedule.temporaries(computations, entry))
    times = hlo.runs(computations, hlo.round_of(computations, entry) if per_round else entry)
    messages = collectives.read(computations, times, devices)
    return Compiled(
        jax.tree.unflatten(tree, results),
        size(results) * memory.alias_size_in_bytes / max(1, memory.output_size_in_bytes),
        tuple(scale * order for order in orders),
        products.flops(computations, times),
        scale * traffic.moved(computations, times, only_products=stand_in),
        collectives.Messages({reach: scale * one for reach, one in messages.received.items()}, messages.count),
    )


def _compile_double_width(traced: Any, arguments: Sequence[Any], donated: int | None, shardings: Any) -> Any:
    counts = [len(jax.tree.leaves(argument)) for argument in arguments]
    donated_leaves = () if donated is None else range(sum(counts[:donated]), sum(counts[: donated + 1]))
    options = {} if shardings is None else {"out_shardings": _flat(shardings, traced.out_info)}
    leaves = [double_width.shape(leaf) for leaf in jax.tree.leaves(arguments)]
    function = core.jaxpr_as_fun(double_width.widened(traced.jaxpr))
    with jax.enable_x64(True):
        jitted = jax.jit(function, donate_argnums=tuple(donated_leaves), compiler_options=LEAST_MEMORY, **options)
        return jitted.lower(*leaves).compile()


def _flat(shardings: Any, results: Any) -> list:
    """One sharding per result, from one that may apply to several."""
    return jax.tree.leaves(
        jax.tree.map(
            lambda place, of: jax.tree.map(lambda _: place, of),
            shardings,
            results,
            is_leaf=lambda node: isinstance(node, jax.sharding.Sharding),
        )
    )


def size(tree: Any) -> float:
    """Bytes of a tree's arrays, or of their shapes, on one device; those without a sharding are complete on each."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def weights_read(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that every token reads: all but a separate embedding table, of which a token reads one row."""
    decoder = dict(params["language_model"])
    if "lm_head" in decoder:
        del decoder["embed_tokens"]
    return decoder
