"""Pieces that towers, connectors and decoders share."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The elementwise function behind a Hugging Face activation name (`config.ACTIVATIONS`)."""
    return _ACTIVATIONS[name]


def linear(features: int, dtype: jnp.dtype, name: str | None, use_bias: bool = False) -> nn.Dense:
    """A projection with kernel `[in, out]`; float32 products are exact on accelerators too."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        precision=precision,
        kernel_init=nn.initializers.normal(0.02),
        name=name,
    )


def layer_norm(epsilon: float, dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    """Layer normalisation with float32 statistics, the variance computed in two passes."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def rms_norm(epsilon: float, dtype: jnp.dtype, name: str | None) -> nn.RMSNorm:
    """Root-mean-square normalisation with float32 statistics."""
    return nn.RMSNorm(epsilon=epsilon, dtype=dtype, name=name)
