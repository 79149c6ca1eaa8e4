"""Products of few rows with a separate matrix per group, lowered to `few_rows.cc`: attention with a 16-bit cache.

XLA's CPU backend converts the whole 16-bit cache to float32 in memory before it multiplies, at every decode step.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Float32

from lvlm_jax.native import build
from lvlm_jax.native.few_rows import FEW_ROWS

_HALF = tuple(map(jnp.dtype, ("bfloat16", "float16")))


def each_rows_dot(
    x: Float[Array, "*N R K"], matrices: Float[Array, "*N _ _"], out_first: bool = False
) -> Float32[Array, "*N R M"]:
    """x · matrices, group by group, summed in float32; at most `FEW_ROWS` rows in 16 bits run natively on a CPU.

    Differentiable in both arguments; batched in both, or in x alone.

    Args:
        x: rows, in the dtype of the matrices.
        matrices: [*N, K, M], or [*N, M, K] if `out_first`.
    """
    if matrices.dtype not in _HALF or x.shape[-2] > FEW_ROWS or 0 in (*x.shape, *matrices.shape):
        return _by_xla(x, matrices, out_first)
    return _product.bind(x, matrices, out_first=out_first)


def _by_xla(x: jax.Array, matrices: jax.Array, out_first: bool, sums: Any = jnp.float32) -> jax.Array:
    groups = tuple(range(x.ndim - 2))
    contracted = ((x.ndim - 1,), (x.ndim - (1 if out_first else 2),))
    exact = matrices.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        x, matrices, (contracted, (groups, groups)), precision=precision, preferred_element_type=sums
    )


_product = Primitive("each_rows_dot")


@_product.def_impl
def _run(x, matrices, **how):
    return _compiled(**how)(x, matrices)


@functools.cache
def _compiled(**how: Any):
    return jax.jit(functools.partial(_product.bind, **how))


@_product.def_abstract_eval
def _shape(x, matrices, *, out_first):
    return jax.core.ShapedArray((*x.shape[:-1], matrices.shape[-2 if out_first else -1]), _sums(matrices))


def _sums(matrices: Any) -> Any:
    """The dtype of sums, which is wider than that of the matrices; `planning` traces programs with wider matrices."""
    return jnp.float32 if matrices.dtype in _HALF else jnp.float64


def _call(x: jax.Array, matrices: jax.Array, out_first: bool) -> jax.Array:
    groups = math.prod(x.shape[:-2])
    rows = x.reshape(groups, *x.shape[-2:]).astype(jnp.float32)
    own = matrices.reshape(groups, *matrices.shape[-2:])
    shape = jax.ShapeDtypeStruct((*rows.shape[:2], own.shape[1 if out_first else 2]), jnp.float32)
    product = jax.ffi.ffi_call(build.EACH, shape)(rows, own, out_first=out_first)
    return product.reshape(*x.shape[:-1], -1)


def _lower_plain(context, x, matrices, *, out_first):
    product = functools.partial(_by_xla, out_first=out_first, sums=_sums(context.avals_in[1]))
    return mlir.lower_fun(product, multiple_results=False)(context, x, matrices)


def _lower_on_cpu(context, x, matrices, *, out_first):
    # Over several devices, the compiler partitions a product, and could not partition a call.
    alone = getattr(context.module_context.axis_context, "num_devices", None) == 1
    if not (alone and context.avals_in[1].dtype in _HALF and build.available()):
        return _lower_plain(context, x, matrices, out_first=out_first)
    return mlir.lower_fun(functools.partial(_call, out_first=out_first), multiple_results=False)(context, x, matrices)


mlir.register_lowering(_product, _lower_plain)
mlir.register_lowering(_product, _lower_on_cpu, platform="cpu")

# Linear in each argument; the product with a tangent is XLA's, which can be transposed.
ad.defjvp(
    _product,
    lambda tangent, x, matrices, *, out_first: _by_xla(tangent, matrices, out_first),
    lambda tangent, x, matrices, *, out_first: _by_xla(x, tangent, out_first),
)


def _batch(operands, axes, *, out_first):
    (x, matrices), (x_axis, matrices_axis) = operands, axes
    if x_axis is None or matrices_axis is None:
        return jax.vmap(functools.partial(_by_xla, out_first=out_first), axes)(x, matrices), 0
    batch_first = jnp.moveaxis(x, x_axis, 0), jnp.moveaxis(matrices, matrices_axis, 0)
    return each_rows_dot(*batch_first, out_first), 0


batching.primitive_batchers[_product] = _batch
