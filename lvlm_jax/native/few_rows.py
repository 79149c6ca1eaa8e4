"""The product of few rows with a matrix, as a primitive that is lowered to `few_rows.cc` where that is faster."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from lvlm_jax.errors import LVLMError
from lvlm_jax.native import build, many_rows

# Up to this many rows, reading the matrix takes most of the time, and `few_rows.cc` reads it once.
FEW_ROWS = 8
# Up to this many rows, those of a short prompt, `some_rows.h` is as fast as XLA and rounds less than half as much.
SOME_ROWS = 128

_FLOATS = tuple(map(jnp.dtype, ("float32", "bfloat16", "float16")))
_HALF = _FLOATS[1:]
_KINDS = (*_FLOATS, jnp.dtype("int8"))


def few_rows_dot(
    x: Float[Array, "*T K"],
    matrix: Array,
    out_first: bool,
    otherwise: Callable[[jax.Array, jax.Array], jax.Array],
    at_most: int = FEW_ROWS,
) -> Float[Array, "*T N"]:
    """x · matrix in the dtype of x, or `otherwise(x, matrix)` if that is as fast or if the case is not supported.

    On a CPU, these products run natively: few rows on a single device with a matrix of float32, bfloat16, float16 or
    int8; up to `SOME_ROWS` rows with a float matrix [K, N]; and any number of rows with a 16-bit matrix, which XLA
    would convert for all layers at once (bfloat16 alone by `many_rows`, if the sizes fit). Sums are float32. On other
    platforms, the program contains `otherwise`. Differentiation and batching are those of `otherwise`; a batch of x
    alone becomes more rows.

    Args:
        x: rows.
        matrix: [K, N], or [N, K] if `out_first`.
        otherwise: the same product for XLA, for any number of leading axes, in the dtype of x; a function of a module,
            not a new one per call.
        at_most: how many rows count as few; with a float matrix [K, N] at least `SOME_ROWS`.

    Raises:
        LVLMError: the inner sizes of x and matrix differ.
    """
    if matrix.ndim != 2 or x.shape[-1] != matrix.shape[1 if out_first else 0]:
        sides = "[N, K]" if out_first else "[K, N]"
        raise LVLMError(
            f"rows {list(x.shape)} cannot be multiplied with a matrix {list(matrix.shape)}; "
            f"expected [..., K] and {sides}"
        )
    at_most = at_most if out_first or matrix.dtype not in _FLOATS else max(at_most, SOME_ROWS)
    ours = matrix.dtype in _HALF or math.prod(x.shape[:-1]) <= at_most
    empty = 0 in (*x.shape, *matrix.shape)
    if empty or not ours or x.dtype not in _FLOATS or matrix.dtype not in _KINDS:
        return otherwise(x, matrix)
    if many_rows.fits(x, matrix):
        return many_rows.many_rows_dot(x, matrix, out_first)
    return _product.bind(x, matrix, out_first=out_first, otherwise=otherwise, at_most=at_most)


_product = Primitive("few_rows_dot")


@_product.def_impl
def _run(x, matrix, **how):
    return _compiled(**how)(x, matrix)


@functools.cache
def _compiled(**how: Any) -> Callable:
    return jax.jit(functools.partial(_product.bind, **how))


@_product.def_abstract_eval
def _shape(x, matrix, *, out_first, **_):
    return jax.core.ShapedArray((*x.shape[:-1], matrix.shape[0 if out_first else 1]), x.dtype)


def _lower_plain(context, x, matrix, *, otherwise, **_):
    return mlir.lower_fun(otherwise, multiple_results=False)(context, x, matrix)


def _lower_on_cpu(context, x, matrix, *, out_first, otherwise, at_most):
    rows, matrix_aval = context.avals_in
    # Over several devices, the compiler partitions a product, and could not partition a call.
    alone = getattr(context.module_context.axis_context, "num_devices", None) == 1
    if alone and math.prod(rows.shape[:-1]) <= at_most and build.available():
        call = functools.partial(_call, out_first=out_first)
    elif matrix_aval.dtype in _HALF:
        call = functools.partial(many_rows.widened, out_first=out_first)
    else:
        call = otherwise
    return mlir.lower_fun(call, multiple_results=False)(context, x, matrix)


def _call(x: jax.Array, matrix: jax.Array, out_first: bool) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    shape = jax.ShapeDtypeStruct((rows.shape[0], matrix.shape[0 if out_first else 1]), jnp.float32)
    product = jax.ffi.ffi_call(build.TARGET, shape)(rows, matrix, out_first=out_first)
    return product.reshape(*x.shape[:-1], -1).astype(x.dtype)


mlir.register_lowering(_product, _lower_plain)
mlir.register_lowering(_product, _lower_on_cpu, platform="cpu")

# Linear in each argument; the product with a tangent is XLA's, which can be transposed.
ad.defjvp(
    _product,
    lambda tangent, x, matrix, *, otherwise, **_: otherwise(tangent, matrix),
    lambda tangent, x, matrix, *, otherwise, **_: otherwise(x, tangent),
)


def _batch(operands, axes, *, otherwise, **how):
    (x, matrix), (x_axis, matrix_axis) = operands, axes
    if matrix_axis is not None:
        return jax.vmap(otherwise, axes)(x, matrix), 0
    return few_rows_dot(jnp.moveaxis(x, x_axis, 0), matrix, otherwise=otherwise, **how), 0


batching.primitive_batchers[_product] = _batch
