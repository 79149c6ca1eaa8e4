"""The product of many rows with a matrix, lowered to `many_rows.h` on CPUs with AMX."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Float32

from lvlm_jax.native import build

# For fewer rows, rearranging the matrix for the tiles does not pay.
MANY_ROWS = 32
_STEP = 32  # both sizes of a matrix must be a multiple of this
_KINDS = (("bfloat16", "bfloat16"), ("bfloat16", "int8"), ("float32", "int8"))  # of rows and matrix


def fits(x: Array, matrix: Array) -> bool:
    """Whether a product is supported, by dtypes and shapes."""
    known = (x.dtype.name, matrix.dtype.name) in _KINDS
    return known and math.prod(x.shape[:-1]) >= MANY_ROWS and not any(size % _STEP for size in matrix.shape)


def many_rows_dot(x: Float[Array, "*T K"], matrix: Array, out_first: bool) -> Float[Array, "*T N"]:
    """x · matrix with sums in float32, for a product that `fits`. Batched in x; differentiable in x, and in a bfloat16
    matrix.

    The result is bfloat16 for a bfloat16 matrix, float32 for an int8 matrix. bfloat16 represents every int8 exactly,
    and a float32 is the sum of three bfloat16, so no digit is lost before the additions.

    Args:
        x: rows.
        matrix: [K, N], or [N, K] if `out_first`.
    """
    return _product.bind(x, matrix, out_first=out_first)


_product = Primitive("many_rows_dot")


@_product.def_impl
def _run(x, matrix, **how):
    return _compiled(**how)(x, matrix)


@functools.cache
def _compiled(**how: Any):
    return jax.jit(functools.partial(_product.bind, **how))


@_product.def_abstract_eval
def _shape(x, matrix, *, out_first):
    return jax.core.ShapedArray((*x.shape[:-1], matrix.shape[0 if out_first else 1]), _result(x, matrix))


def _result(x: Array, matrix: Array) -> jnp.dtype:
    return jnp.dtype(jnp.float32) if matrix.dtype == jnp.int8 else x.dtype


def _by_xla(x: jax.Array, matrix: jax.Array, out_first: bool) -> jax.Array:
    contracted = ((x.ndim - 1,), (1 if out_first else 0,)), ((), ())
    dtype = _result(x, matrix)
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(x.astype(dtype), matrix.astype(dtype), contracted, exact)


def _call(x: jax.Array, matrix: jax.Array, out_first: bool) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])
    shape = jax.ShapeDtypeStruct((rows.shape[0], matrix.shape[0 if out_first else 1]), _result(x, matrix))
    product = jax.ffi.ffi_call(build.TILES, shape)(rows, matrix, out_first=out_first)
    return product.reshape(*x.shape[:-1], -1)


def _lower_plain(context, x, matrix, *, out_first):
    call = functools.partial(_by_xla, out_first=out_first)
    return mlir.lower_fun(call, multiple_results=False)(context, x, matrix)


def _lower_on_cpu(context, x, matrix, *, out_first):
    # Over several devices, the compiler partitions a product, and could not partition a call.
    alone = getattr(context.module_context.axis_context, "num_devices", None) == 1
    if alone and build.tiles():
        call = functools.partial(_call, out_first=out_first)
    else:
        call = functools.partial(widened, out_first=out_first, dtype=context.avals_out[0].dtype)
    return mlir.lower_fun(call, multiple_results=False)(context, x, matrix)


mlir.register_lowering(_product, _lower_plain)
mlir.register_lowering(_product, _lower_on_cpu, platform="cpu")


def _of_rows(cotangent, x, matrix, *, out_first):
    """The gradient in x: a product with the transposed matrix."""
    del x
    return _product.bind(cotangent, matrix, out_first=not out_first)


def _of_matrix(cotangent, x, matrix, *, out_first):
    del matrix
    rows = tuple(range(x.ndim - 1))
    one, other = (cotangent, x) if out_first else (x, cotangent)
    return jax.lax.dot_general(one, other, ((rows, rows), ((), ())))


ad.defbilinear(_product, _of_rows, _of_matrix)


def _batch(operands, axes, *, out_first):
    (x, matrix), (x_axis, matrix_axis) = operands, axes
    if matrix_axis is not None:
        return jax.vmap(functools.partial(_by_xla, out_first=out_first), axes)(x, matrix), 0
    return _product.bind(jnp.moveaxis(x, x_axis, 0), matrix, out_first=out_first), 0


batching.primitive_batchers[_product] = _batch


def widened(x: jax.Array, matrix: jax.Array, out_first: bool, dtype: jnp.dtype | None = None) -> jax.Array:
    """The product in float32 on a CPU, then in `dtype` (that of x); the matrix is converted only when it is needed."""
    wide = x.astype(jnp.float32)
    contracted = ((x.ndim - 1,), (1 if out_first else 0,)), ((), ())
    return jax.lax.dot_general(wide, converted_late(matrix, wide), contracted).astype(dtype or x.dtype)


def converted_late(matrix: Array, x: Float[Array, "..."]) -> Float32[Array, "..."]:
    """The matrix in float32, in an expression that depends on `x`, so that it cannot be computed earlier.

    XLA's CPU backend starts everything whose arguments are ready. It would convert the parameters of all layers at
    once, and the whole model would be in memory as float32; an optimization barrier does not prevent this.
    """
    never = x[(0,) * x.ndim] > jnp.inf
    return (matrix + never.astype(matrix.dtype)).astype(jnp.float32)
