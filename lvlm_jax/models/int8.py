"""int8 kernels of linear layers with one scale per output channel: W[n, k] ≈ kernel[n, k] · scale[n].

Only weights are quantized, symmetrically: a product is x · kernelᵀ with x in float, then multiplied by the scales. No
library fits: AQT was replaced by Qwix, and Qwix replaces arrays of the tree by its own objects and intercepts the
module's products, but adapters, key tables and sharding rules need plain leaves. It also leaves the product of a float
x and an int8 kernel to XLA, which is slow on a CPU (see below).

Kernels are [out, in] here, as in Hugging Face and unlike our float kernels, because a product reads them row by row.
The computation depends on the backend:

- GPU and TPU: a dot of x and the converted kernel. XLA converts inside the product's loop, so it reads int8 from
  memory.
- CPU, few rows (decoding): `native` multiplies in float32, converting the kernel on the fly. XLA would first write the
  converted kernel to memory, and be six times slower than with a float32 kernel. Without `native`, x is rounded to 22
  bits relative to its row's largest value (a float32 sum loses about as much) and split into three int8 numbers, whose
  int8 · int8 -> int32 products are exact.
- CPU, many rows (prompts): `native` multiplies in the tiles of AMX where the processor has them, faster than with a
  float32 kernel. Elsewhere the kernel is converted one layer at a time.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8, Int32

from lvlm_jax.native import converted_late, few_rows_dot, many_rows

LARGEST = 127  # largest integer of a kernel; -128 is not used, so that the range is symmetric
# Up to this many rows, `native` (and without it, three int8 rows each) is faster on a CPU than converting the kernel.
NATIVE_ROWS = 32
FEW_ROWS = 16

_LIMB = 7  # bits per part
_LIMBS = 3


def quantize(weight: Float[Array, "N K"]) -> tuple[Int8[Array, "N K"], Float32[Array, "N"]]:
    """The nearest kernel and its scales: the largest weight of each output channel becomes ±127."""
    weight = weight.astype(jnp.float32)
    scale = jnp.abs(weight).max(axis=1) / LARGEST
    steps = jnp.round(weight / jnp.where(scale > 0, scale, 1)[:, None])
    return jnp.clip(steps, -LARGEST, LARGEST).astype(jnp.int8), scale


def dequantize(kernel: Int8[Array, "N K"], scale: Float[Array, "N"]) -> Float32[Array, "K N"]:
    """The float kernel that an int8 kernel and its scales represent, with the axes of float kernels."""
    return (kernel.astype(jnp.float32) * scale.astype(jnp.float32)[:, None]).T


@jax.custom_vjp
def dot(x: Float[Array, "*T K"], kernel: Int8[Array, "N K"]) -> Float32[Array, "*T N"]:
    """x · kernelᵀ in float32, before scales. Differentiable in x, like the product with the converted kernel."""
    return jax.lax.platform_dependent(x, kernel, cpu=_dot_on_cpu, default=_dot_converted)


def _dot_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple]:
    # The backward pass needs only the dtype of x. It must not keep a converted kernel.
    return dot(x, kernel), (kernel, jnp.zeros((0,), x.dtype))


def _dot_backward(residuals: tuple, gradient: jax.Array) -> tuple[jax.Array, None]:
    kernel, like = residuals
    gradient = gradient.astype(like.dtype)

    def on_cpu(gradient: jax.Array, kernel: jax.Array) -> jax.Array:
        return _contract(gradient.astype(jnp.float32), converted_late(kernel, gradient), 0)

    def converted(gradient: jax.Array, kernel: jax.Array) -> jax.Array:
        return _contract(gradient, kernel.astype(gradient.dtype), 0)

    x_gradient = jax.lax.platform_dependent(gradient, kernel, cpu=on_cpu, default=converted)
    return x_gradient.astype(like.dtype), None


dot.defvjp(_dot_forward, _dot_backward)


def _contract(x: jax.Array, matrix: jax.Array, axis: int) -> jax.Array:
    """The last axis of x times an axis of a matrix, summed in float32; float32 products are exact."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    contracted = ((x.ndim - 1,), (axis,)), ((), ())
    return jax.lax.dot_general(x, matrix, contracted, precision, preferred_element_type=jnp.float32)


def _dot_converted(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _contract(x, kernel.astype(x.dtype), 1)


def _dot_on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
    if math.prod(x.shape[:-1]) > NATIVE_ROWS and many_rows.fits(x, kernel):
        return many_rows.many_rows_dot(x, kernel, out_first=True)
    return few_rows_dot(x.astype(jnp.float32), kernel, True, _dot_by_xla, at_most=NATIVE_ROWS)


def _dot_by_xla(x: jax.Array, kernel: jax.Array) -> jax.Array:
    few = math.prod(x.shape[:-1]) <= FEW_ROWS
    return _dot_limbs(x, kernel) if few else _contract(x, converted_late(kernel, x), 1)


def _dot_limbs(x: Float32[Array, "*T K"], kernel: Int8[Array, "N K"]) -> Float32[Array, "*T N"]:
    """The product by integers: x = step · (2^14 · high + 2^7 · middle + low), each of the three in int8."""
    largest = LARGEST << _LIMB * (_LIMBS - 1)
    step = jnp.maximum(jnp.abs(x).max(axis=-1), 1e-30) / largest
    rest = jnp.round(x / step[..., None]).astype(jnp.int32)
    limbs = []
    for _ in range(_LIMBS - 1):
        low = _lowest(rest)
        limbs.append(low.astype(jnp.int8))
        rest = (rest - low) >> _LIMB
    limbs.append(rest.astype(jnp.int8))
    # The kernel comes first: XLA then streams it and rearranges only the few rows. A sum of 127 · 127 · in fits into
    # int32 up to 133,000 channels.
    contracted = ((1,), (x.ndim,)), ((), ())
    sums = jax.lax.dot_general(kernel, jnp.stack(limbs), contracted, preferred_element_type=jnp.int32)
    total = jnp.zeros((), jnp.float32)
    for limb in reversed(range(_LIMBS)):
        total = total * (1 << _LIMB) + sums[:, limb].astype(jnp.float32)
    return jnp.moveaxis(total, 0, -1) * step[..., None]


def _lowest(number: Int32[Array, "*S"]) -> Int32[Array, "*S"]:
    """The remainder modulo 2^7 in [-64, 63]."""
    half = 1 << (_LIMB - 1)
    return ((number + half) & ((1 << _LIMB) - 1)) - half
