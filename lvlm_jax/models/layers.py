"""Layers that towers, connectors and decoders share."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from lvlm_jax.models import int8
from lvlm_jax.native import few_rows_dot

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
}

# The leaves of a LoRA adapter beside a kernel: A [in, r], B [r, out], the factor of their product, the dropout rate.
LORA_LEAVES = ("lora_a", "lora_b", "lora_scale", "lora_dropout")

# The leaves that replace `kernel` [in, out] in a quantized projection: integers [out, in] and scales [out] (`int8`).
INT8_LEAVES = ("kernel_int8", "kernel_scale")


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The elementwise function of a Hugging Face activation name (`config.ACTIVATIONS`)."""
    return _ACTIVATIONS[name]


def projections(flat: Mapping[str, Any]) -> dict[str, tuple[Any, tuple[int, int]]]:
    """The projections of a flat tree (path -> leaf): module path -> (its stored weight, (in, out))."""
    projections = {}
    for path, leaf in flat.items():
        module, _, name = path.rpartition("/")
        if name == "kernel" and leaf.ndim == 2:
            projections[module] = leaf, tuple(leaf.shape)
        elif name == INT8_LEAVES[0]:
            projections[module] = leaf, tuple(leaf.shape[::-1])
    return projections


class Linear(nn.Dense):
    """`nn.Dense` with a low-rank term if its parameters contain one (LoRA, arXiv 2106.09685).

    Beside `kernel` [in, out] there may be `LORA_LEAVES`. The dropout rate is optional; it acts only on the input of the
    low-rank term, and only if the module is applied with an rng "dropout". These leaves are attached from outside
    (`weights.lora`, `weights.peft`), never initialised here. Without them this is `nn.Dense`, operation by operation,
    except where `native` multiplies on a CPU.

    `kernel` may be replaced by `INT8_LEAVES` (`weights.quantize`); biases and low-rank terms stay as they are.
    """

    def __call__(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        quantized = self.has_variable("params", INT8_LEAVES[0])
        y = self._quantized(x) if quantized else super().__call__(x)
        return y + self._low_rank(x) if self.has_variable("params", "lora_a") else y

    def _quantized(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        kernel, scale = (self.get_variable("params", name) for name in INT8_LEAVES)
        y = (int8.dot(x.astype(self.dtype), kernel) * scale).astype(self.dtype)
        return y + self.get_variable("params", "bias").astype(self.dtype) if self.use_bias else y

    def _low_rank(self, x: Float[Array, "*T I"]) -> Float[Array, "*T O"]:
        def leaf(name: str) -> jax.Array:
            return self.get_variable("params", name)

        x, a, b = nn.dtypes.promote_dtype(x, leaf("lora_a"), leaf("lora_b"), dtype=self.dtype)
        lead = x.shape[:-1]
        if math.prod(lead[:-2]) == 1:
            # With one axis of rows, the gradients of A and B are plain products; with several, XLA's CPU compiler
            # transposes whole activations. Several branches keep their axes, because their rows lie on the devices of
            # their samples.
            x = x.reshape(-1, x.shape[-1])
        if self.has_variable("params", "lora_dropout") and self.has_rng("dropout"):
            keep_rate = 1.0 - leaf("lora_dropout").astype(jnp.float32)
            mask = jax.random.bernoulli(self.make_rng("dropout"), keep_rate, x.shape)
            x = jnp.where(mask, x / keep_rate, 0).astype(x.dtype)
        # Scaled between the products, in float32: this touches the fewest numbers and does not round the scale to
        # bfloat16.
        inner = jnp.dot(x, a, precision=self.precision, preferred_element_type=jnp.float32)
        inner = (inner * leaf("lora_scale").astype(jnp.float32)).astype(x.dtype)
        return jnp.dot(inner, b, precision=self.precision).reshape(*lead, -1)


def _exact(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _contract(x, kernel, 0)


def _exact_transposed(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _contract(x, kernel, 1)


def _contract(x: jax.Array, kernel: jax.Array, axis: int) -> jax.Array:
    """The last axis of x times an axis of a kernel, in the dtype of x; float32 products are exact."""
    exact = x.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (axis,)), ((), ())), precision=precision)


def _dot_general(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """The product of a `Linear`, used instead of `jax.lax.dot_general`."""
    return few_rows_dot(x, kernel, False, _exact)


def linear(features: int, dtype: jnp.dtype, name: str | None, use_bias: bool = False) -> Linear:
    """A projection with kernel `[in, out]`; float32 products are exact on accelerators too."""
    exact = dtype == jnp.float32
    return Linear(
        features,
        use_bias=use_bias,
        dtype=dtype,
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        dot_general=_dot_general,
        kernel_init=nn.initializers.normal(0.02),
        name=name,
    )


class Embed(nn.Embed):
    """`nn.Embed` that converts only the rows it reads; XLA's CPU backend first converts a whole 16-bit table to
    float32."""

    def __call__(self, tokens: Int[Array, "*T"]) -> Float[Array, "*T E"]:
        if self.embedding.dtype.itemsize != 2:
            return super().__call__(tokens)
        return jax.lax.platform_dependent(self.embedding, tokens, cpu=_rows_by_bits, default=_rows).astype(self.dtype)


def _rows(table: Num[Array, "V E"], tokens: Int[Array, "*T"]) -> Num[Array, "*T E"]:
    return jnp.take(table, tokens, axis=0)


@jax.custom_jvp
def _rows_by_bits(table: jax.Array, tokens: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(_rows(jax.lax.bitcast_convert_type(table, jnp.uint16), tokens), table.dtype)


@_rows_by_bits.defjvp
def _derivative(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return _rows_by_bits(*primals), _rows(tangents[0], primals[1])


def tied_head(hidden: Float[Array, "*T E"], embedding: Float[Array, "V E"]) -> Float[Array, "*T V"]:
    """Logits from the table of embeddings; float32 products are exact on accelerators too."""
    return few_rows_dot(hidden, embedding.astype(hidden.dtype), True, _exact_transposed)


def layer_norm(epsilon: float, dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    """Layer normalisation with float32 statistics, the variance computed in two passes."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


class OffsetRMSNorm(nn.Module):
    """Root-mean-square normalisation whose parameter is the scale minus one (Gemma)."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*T W"]) -> Float[Array, "*T W"]:
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt((wide**2).mean(axis=-1, keepdims=True) + self.epsilon)
        return (wide * (1 + scale)).astype(self.dtype)


def rms_norm(epsilon: float, dtype: jnp.dtype, name: str | None, offset: bool = False) -> nn.Module:
    """Root-mean-square normalisation with float32 statistics; `offset` as in `OffsetRMSNorm`."""
    return OffsetRMSNorm(epsilon, dtype, name=name) if offset else nn.RMSNorm(epsilon=epsilon, dtype=dtype, name=name)
