"""Attention without its map in memory and its gradient, as primitives that are lowered to `attention.h` on a CPU."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array, Float, Float32

from lvlm_jax.native import build

_FLOATS = tuple(map(jnp.dtype, ("float32", "bfloat16", "float16")))


def attention(
    otherwise: Callable,
    query: Float[Array, "B H T D"],
    key: Float[Array, "B K S D"],
    value: Float[Array, "B K S D"],
    mask: Any,
) -> tuple[Float[Array, "B H T D"], Float32[Array, "B H T 1"]]:
    """softmax(query · keyᵀ / √D) · value, and the logarithm of each row's sum of exponentials.

    It runs natively on a single CPU device, in float32 also for 16-bit operands; elsewhere the program contains
    `otherwise`. Not differentiable by itself, see `attention_gradient`.

    Args:
        otherwise: the same function of (query, key, value, mask) for XLA; a function of a module, not a new one per
            call.
        mask: which columns each row sees; a pytree of arrays with the method `LazyMask.in_integers`.
    """
    if any(array.dtype not in _FLOATS or 0 in array.shape for array in (query, key, value)):
        return otherwise(query, key, value, mask)
    return _bind(_forward, otherwise, mask, (query, key, value))


def attention_gradient(
    otherwise: Callable,
    d_result: Float[Array, "B H T D"],
    query: Float[Array, "B H T D"],
    key: Float[Array, "B K S D"],
    value: Float[Array, "B K S D"],
    mask: Any,
    result: Float[Array, "B H T D"],
    sums: Float32[Array, "B H T 1"],
) -> tuple[Float[Array, "B H T D"], Float[Array, "B K S D"], Float[Array, "B K S D"]]:
    """The gradients of query, key and value, given that of the result; it runs where `attention` does.

    Args:
        otherwise: the same function of the other arguments for XLA.
        result, sums: what `attention` has returned.
    """
    if any(array.dtype not in _FLOATS or 0 in array.shape for array in (d_result, query, key, value)):
        return otherwise(d_result, query, key, value, mask, result, sums)
    return _bind(_gradient, otherwise, mask, (d_result, query, key, value, result, sums))


def _bind(primitive: Primitive, otherwise: Callable, mask: Any, arrays: Sequence[jax.Array]) -> tuple:
    leaves, tree = jax.tree.flatten(mask)
    return tuple(primitive.bind(*arrays, *leaves, otherwise=otherwise, tree=tree))


_forward, _gradient = Primitive("attention"), Primitive("attention_gradient")
_ARRAYS = {_forward: 3, _gradient: 6}  # operands before those of the mask


def _forward_shapes(query, *_, **__):
    return [query, jax.core.ShapedArray((*query.shape[:3], 1), jnp.float32)]


def _gradient_shapes(_, query, key, value, *__, **___):
    return [query, key, value]


def _forward_by_xla(otherwise: Callable, mask: Any, query, key, value) -> tuple:
    return otherwise(query, key, value, mask)


def _gradient_by_xla(otherwise: Callable, mask: Any, d_result, query, key, value, result, sums) -> tuple:
    return otherwise(d_result, query, key, value, mask, result, sums)


def _forward_call(mask: Any, query, key, value) -> tuple:
    operands = _float32(query, key, value)
    shapes = [jax.ShapeDtypeStruct((*query.shape[:3], size), jnp.float32) for size in (query.shape[3], 1)]
    mixed, sums = jax.ffi.ffi_call(build.ATTENTION, shapes)(*operands, *mask.in_integers())
    return mixed.astype(query.dtype), sums


def _gradient_call(mask: Any, d_result, query, key, value, result, sums) -> tuple:
    d_result, result, *operands = _float32(d_result, result, query, key, value)
    level = (d_result * result).sum(axis=-1, keepdims=True)
    batch, heads, rows, size = query.shape
    key_heads, columns = key.shape[1:3]
    shapes = [jax.ShapeDtypeStruct((batch, heads, count, size), jnp.float32) for count in (rows, columns, columns)]
    call = jax.ffi.ffi_call(build.ATTENTION_GRADIENT, shapes)
    d_query, *of_heads = call(d_result, level, *operands, sums, *mask.in_integers())
    of_groups = (array.reshape(batch, key_heads, -1, columns, size).sum(axis=2) for array in of_heads)
    return tuple(array.astype(query.dtype) for array in (d_query, *of_groups))


def _float32(*arrays: jax.Array) -> list[jax.Array]:
    return [array.astype(jnp.float32) for array in arrays]


def _define(primitive: Primitive, shapes: Callable, by_xla: Callable, call: Callable) -> None:
    """Says how a primitive runs, and what shapes it returns."""
    primitive.multiple_results = True
    count = _ARRAYS[primitive]

    def lower(function: Callable, context: Any, *operands: Any, tree: Any) -> Any:
        def whole(*arrays: jax.Array) -> tuple:
            return function(jax.tree.unflatten(tree, arrays[count:]), *arrays[:count])

        return mlir.lower_fun(whole, multiple_results=True)(context, *operands)

    def lower_plain(context: Any, *operands: Any, otherwise: Callable, tree: Any) -> Any:
        return lower(functools.partial(by_xla, otherwise), context, *operands, tree=tree)

    def lower_on_cpu(context: Any, *operands: Any, otherwise: Callable, tree: Any) -> Any:
        # Over several devices, the compiler partitions loops and products, and could not partition a call.
        alone = getattr(context.module_context.axis_context, "num_devices", None) == 1
        if not (alone and build.available()):
            return lower_plain(context, *operands, otherwise=otherwise, tree=tree)
        return lower(call, context, *operands, tree=tree)

    def batch(operands: Sequence[Any], axes: Sequence[Any], *, otherwise: Callable, tree: Any) -> Any:
        def whole(*arrays: jax.Array) -> tuple:
            return by_xla(otherwise, jax.tree.unflatten(tree, arrays[count:]), *arrays[:count])

        results = jax.vmap(whole, axes)(*operands)
        return results, [0] * len(results)

    @functools.cache
    def compiled(**how: Any) -> Callable:
        return jax.jit(functools.partial(primitive.bind, **how))

    primitive.def_impl(lambda *operands, **how: compiled(**how)(*operands))
    primitive.def_abstract_eval(shapes)
    mlir.register_lowering(primitive, lower_plain)
    mlir.register_lowering(primitive, lower_on_cpu, platform="cpu")
    batching.primitive_batchers[primitive] = batch


_define(_forward, _forward_shapes, _forward_by_xla, _forward_call)
_define(_gradient, _gradient_shapes, _gradient_by_xla, _gradient_call)
