"""What vision towers share: attention over patches, patches from pixels."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def patch_attention(
    query: Float[Array, "I P H D"],
    key: Float[Array, "I Q H D"],
    value: Float[Array, "I Q H D"],
    mask: Bool[Array, "#I #P Q"] | None = None,
    bias: Float[Array, "#I #H P Q"] | None = None,
) -> Float[Array, "I P H D"]:
    """Bidirectional attention inside each row; `mask` says which patches may be seen, `bias` is added to the logits."""
    dtype = query.dtype
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    # Written out: jax.nn.dot_product_attention knows no float16 on CPUs.
    product = partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    logits = product("IPHD,IQHD->IHPQ", query, key) * query.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(dtype)
    return product("IHPQ,IQHD->IPHD", weights, value).astype(dtype)


def patch_convolution(
    pixels: Float[Array, "I 3 Y X"], width: int, patch: int, dtype: jnp.dtype, name: str, use_bias: bool
) -> Float[Array, "I P W"]:
    """Non-overlapping patches projected to `width` channels, row by row; called inside a compact module."""
    patches = nn.Conv(
        width,
        kernel_size=(patch, patch),
        strides=patch,
        padding="VALID",
        use_bias=use_bias,
        dtype=dtype,
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        name=name,
    )(pixels.transpose(0, 2, 3, 1))
    return patches.reshape(pixels.shape[0], -1, width)
