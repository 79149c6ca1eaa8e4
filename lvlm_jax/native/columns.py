"""Writes columns into a bfloat16 cache, in place and bit for bit; lowered to `few_rows.cc`.

XLA's CPU backend updates an array of bfloat16 in float32: it converts and copies the whole cache at every decode step.
"""

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Int

from lvlm_jax.native import build


def write_columns(
    array: Float[Array, "*N S D"], new: Float[Array, "*N C D"], index: Int[Array, ""]
) -> Float[Array, "*N S D"]:
    """`array` with `new` in the columns from `index` on; natively if it is bfloat16 on a single CPU device.

    Differentiable in both; batched as XLA's update is.
    """
    new = new.astype(array.dtype)
    if array.dtype != jnp.bfloat16 or 0 in (*array.shape, *new.shape):
        return _by_xla(array, new, index)
    return _write.bind(array, new, index)


def _by_xla(array: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, new, index, axis=array.ndim - 2)


_write = Primitive("write_columns")


@_write.def_impl
def _run(array, new, index):
    return _compiled()(array, new, index)


@functools.cache
def _compiled():
    return jax.jit(_write.bind)


@_write.def_abstract_eval
def _shape(array, new, index):
    del new, index
    return jax.core.ShapedArray(array.shape, array.dtype)


def _call(array: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    # No reshape here, for which XLA would copy the array.
    kind = jax.ShapeDtypeStruct(array.shape, array.dtype)
    return jax.ffi.ffi_call(build.COLUMNS, kind, input_output_aliases={0: 0})(array, new, jnp.int32(index))


def _lower_plain(context, *operands):
    return mlir.lower_fun(_by_xla, multiple_results=False)(context, *operands)


def _lower_on_cpu(context, *operands):
    # Over several devices the compiler divides an update, and could not divide a call.
    alone = getattr(context.module_context.axis_context, "num_devices", None) == 1
    return mlir.lower_fun(_call if alone and build.available() else _by_xla, multiple_results=False)(context, *operands)


mlir.register_lowering(_write, _lower_plain)
mlir.register_lowering(_write, _lower_on_cpu, platform="cpu")


def _derivative(primals, tangents):
    array, new, index = primals
    array_tangent, new_tangent = (
        ad.instantiate_zeros(tangent) if isinstance(tangent, ad.Zero) else tangent for tangent in tangents[:2]
    )
    return _write.bind(array, new, index), _by_xla(array_tangent, new_tangent, index)


ad.primitive_jvps[_write] = _derivative


def _batch(operands, axes):
    return jax.vmap(_by_xla, axes)(*operands), 0


batching.primitive_batchers[_write] = _batch
