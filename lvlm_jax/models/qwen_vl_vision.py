"""The tower and the connector of Qwen-VL (arXiv 2308.12966): ViT-bigG without a class token, a 256-query resampler."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lvlm_jax.models.clip import ClipLayer, VisionConfig
from lvlm_jax.models.interpolation import center_aligned, cubic_taps
from lvlm_jax.models.layers import layer_norm, linear
from lvlm_jax.models.vision import patch_attention, patch_convolution

POSITIONS = 256  # the tower's position table is a 16 x 16 grid, whatever the image size
POOL_HEAD_DIM = 128  # channels of each of the resampler's heads


class QwenVisionTower(nn.Module):
    """Maps images to patch features. Its layers are CLIP's."""

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixels: Float[Array, "I 3 Y X"]) -> Float[Array, "I P W"]:
        config = self.config
        x = patch_convolution(
            pixels.astype(self.dtype), config.hidden_size, config.patch_size, self.dtype, "patch_embedding",
            use_bias=False,
        )  # fmt: skip
        initializer = nn.initializers.normal(config.hidden_size**-0.5)
        table = self.param("position_embedding", initializer, (POSITIONS, config.hidden_size))
        x = x + on_grid(table, x.shape[1]).astype(self.dtype)
        x = layer_norm(config.layer_norm_eps, self.dtype, "pre_layernorm")(x)
        for index in range(config.num_layers):
            x = ClipLayer(config, self.dtype, name=f"layers_{index}")(x)
        return x


class Resampler(nn.Module):
    """Maps patch features to a fixed number of image tokens: learned queries on a square grid attend to the patches
    once.

    Queries and keys have sine-cosine positions of their place in the image, so each query attends near its own place.

    Attributes:
        queries: number of image tokens Q, a square.
        width: channels E of the image tokens.
        epsilon: epsilon of the norms.
    """

    queries: int
    width: int
    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features: Float[Array, "I P W"]) -> Float[Array, "I Q E"]:
        images, patches, channels = features.shape
        heads = self.width // POOL_HEAD_DIM

        def project(name: str, x: Float[Array, "J N E"]) -> Float[Array, "J N H D"]:
            return linear(self.width, self.dtype, name, use_bias=True)(x).reshape(*x.shape[:2], heads, -1)

        # Part of the checkpoint, but never trained.
        positions = self.param("position_embedding", sinusoidal_initializer, (self.queries, self.width))
        positions = jax.lax.stop_gradient(positions)
        query = self.param("query", nn.initializers.normal(0.02), (self.queries, self.width))
        query = layer_norm(self.epsilon, self.dtype, "ln_q")(query) + positions.astype(self.dtype)
        if channels != self.width:
            features = linear(self.width, self.dtype, "kv_proj")(features)
        features = layer_norm(self.epsilon, self.dtype, "ln_kv")(features)
        query = project("q_proj", query[None])
        mixed = patch_attention(
            jnp.broadcast_to(query, (images, *query.shape[1:])),
            project("k_proj", features + on_grid(positions, patches).astype(self.dtype)),
            project("v_proj", features),
        )
        mixed = mixed.reshape(images, self.queries, self.width)
        x = linear(self.width, self.dtype, "out_proj", use_bias=True)(mixed)
        x = layer_norm(self.epsilon, self.dtype, "ln_post")(x)
        return linear(self.width, self.dtype, "proj")(x)


def on_grid(table: Float[Array, "S W"], places: int) -> Float[Array, "P W"]:
    """Resizes a square grid of positions, row by row, to a square grid of `places` by bicubic interpolation."""
    source, target = math.isqrt(table.shape[0]), math.isqrt(places)
    if source == target:
        return table
    weights = bicubic_weights(source, target)
    grid = table.astype(jnp.float32).reshape(source, source, -1)
    resized = jnp.einsum("ya,xb,abw->yxw", weights, weights, grid, precision=jax.lax.Precision.HIGHEST)
    return resized.reshape(places, -1)


def bicubic_weights(source: int, target: int) -> Float[np.ndarray, "T S"]:
    """Weights of `source` samples in each of `target` samples: torch's bicubic interpolation, corners not aligned."""
    entries, taps = cubic_taps(center_aligned(target, source), source)
    weights = np.zeros((target, source), np.float32)
    np.add.at(weights, (np.arange(target)[:, None], entries), taps)  # at the edge, several taps have the same index
    return weights


def sinusoidal_initializer(
    key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32
) -> Float[Array, "Q E"]:
    """Places on a square grid: the first half of the channels encodes the column, the second half the row."""
    del key
    count, width = shape
    side, quarter = math.isqrt(count), width // 4
    frequency = 10000.0 ** -(np.arange(quarter) / quarter)
    angles = np.arange(side)[:, None] * frequency
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    columns, rows = np.tile(axis, (side, 1)), np.repeat(axis, side, axis=0)
    return jnp.asarray(np.concatenate([columns, rows], axis=1), dtype)
