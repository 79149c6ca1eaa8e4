"""Modules of the towers of Qwen2-VL (arXiv 2409.12191) and its descendants, over rows of loose patches.

The rows and their geometry come from `loose_patches`: one padded row per image, M² consecutive patches per token.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.attention.rotary import RopeConfig, Rotation, frequencies, rotate
from lvlm_jax.models.layers import activation, layer_norm, linear, rms_norm
from lvlm_jax.models.loose_patches import PatchTowerConfig
from lvlm_jax.models.vision import by_pictures, in_turn, patch_attention

LARGEST_MAP = 2**24  # elements of the window maps computed at a time, 64 MiB in float32
CHUNK = 2**14  # patches (of all images) that go through an MLP at a time
FILLER_WINDOW = 2**31 - 1  # the window number of filler
# Attention of queries, keys and values, `Float[Array, "R P H D"]` each.
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def axial_rotation(coordinates: Int[Array, "R P 2"], head_dim: int, theta: float) -> Rotation:
    """Rotary positions in a plane: in each half of a head, a quarter of the channels rotates with the row, a quarter
    with the column."""
    frequency = frequencies(RopeConfig(theta=theta), head_dim // 2)
    angle = coordinates.astype(jnp.float32)[..., None] * frequency
    angle = angle.reshape(*coordinates.shape[:2], -1)
    return Rotation(jnp.cos(angle), jnp.sin(angle)).heads(axis=2)


def window_attention(
    query: Float[Array, "R P H D"],
    key: Float[Array, "R P H D"],
    value: Float[Array, "R P H D"],
    windows: Int[Array, "R P"],
    size: int,
) -> Float[Array, "R P H D"]:
    """Each patch attends to the patches of its window.

    Args:
        windows: window number of each patch; the patches of a window are neighbours.
        size: largest number of patches in a window. So a block of this size only sees itself and its neighbour blocks.
    """
    rows, patches, heads, channels = query.shape
    count = min(-(-patches // size), max(1, LARGEST_MAP // (rows * heads * 3 * size**2)))  # blocks at a time
    filler = -patches % (count * size)

    def blocks(array: jax.Array, around: int = 0, fill: int = 0) -> jax.Array:
        edges = ((0, 0), (around, filler + around)) + ((0, 0),) * (array.ndim - 2)
        padded = jnp.pad(array, edges, constant_values=fill)
        return padded.reshape(rows, -1, size, *array.shape[2:])

    query, own = blocks(query), blocks(windows, fill=FILLER_WINDOW)
    key, value, window_keys = blocks(key, size), blocks(value, size), blocks(windows, size, FILLER_WINDOW - 1)

    def attended(start: Int[Array, ""]) -> Float[Array, "R U H D"]:
        def here(array: jax.Array) -> jax.Array:
            part = jax.lax.dynamic_slice_in_dim(array, start, count, axis=1)
            return part.reshape(-1, *array.shape[2:])

        def around(array: jax.Array) -> jax.Array:
            part = jax.lax.dynamic_slice_in_dim(array, start, count + 2, axis=1)
            beside = jnp.concatenate([part[:, :-2], part[:, 1:-1], part[:, 2:]], axis=2)
            return beside.reshape(-1, *beside.shape[2:])

        mask = here(own)[:, :, None] == around(window_keys)[:, None, :]
        return patch_attention(here(query), around(key), around(value), mask).reshape(rows, -1, heads, channels)

    # The backward pass recomputes the weights instead of keeping them all.
    mixed = jax.lax.map(jax.checkpoint(attended), jnp.arange(query.shape[1] // count) * count)
    return jnp.moveaxis(mixed, 0, 1).reshape(rows, -1, heads, channels)[:, :patches]


def window_numbers(coordinates: Int[Array, "R P 2"], valid: Bool[Array, "R P"], side: int) -> Int[Array, "R P"]:
    """The window number of each patch; windows have `side` x `side` patches or end with the image; filler is last."""
    window = coordinates // side
    # Larger than the number of windows in a row of any image, so that numbers are unique.
    return jnp.where(valid, window[..., 0] * 2**15 + window[..., 1], FILLER_WINDOW)


class PatchEmbedding(nn.Module):
    """Projects patches to the width of the tower."""

    config: PatchTowerConfig
    dtype: jnp.dtype
    use_bias: bool = False

    @nn.compact
    def __call__(self, patches: Float[Array, "R P C"]) -> Float[Array, "R P W"]:
        config = self.config
        # The shape in checkpoints, so that conversion is a permutation.
        shape = (3, config.frames, config.patch_size, config.patch_size, config.hidden_size)
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape).reshape(-1, config.hidden_size)
        precision = jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
        embedded = jnp.dot(patches.astype(self.dtype), kernel.astype(self.dtype), precision=precision)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (config.hidden_size,))
            embedded = embedded + bias.astype(self.dtype)
        return embedded


class PatchAttention(nn.Module):
    """Multi-head attention with rotary positions for rows and columns; `attention` computes it from queries, keys and
    values."""

    config: PatchTowerConfig
    dtype: jnp.dtype
    use_bias: bool = True
    output_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "R P W"], rotation: Rotation, attention: Attention) -> Float[Array, "R P W"]:
        def project(name: str) -> Float[Array, "R P H D"]:
            flat = linear(x.shape[-1], self.dtype, name, use_bias=self.use_bias)(x)
            return flat.reshape(*x.shape[:2], self.config.num_heads, -1)

        query, key = rotate(project("q_proj"), rotation), rotate(project("k_proj"), rotation)
        mixed = attention(query, key, project("v_proj"))
        output = linear(x.shape[-1], self.dtype, "out_proj", use_bias=self.output_bias)
        return output(mixed.reshape(x.shape))


def apply_in_chunks(mlp: nn.Module, x: Float[Array, "R P W"]) -> Float[Array, "R P W"]:
    """Applies a module with many hidden channels to at most `CHUNK` patches at a time."""
    rows, patches, width = x.shape
    count = next(n for n in range(1, patches + 1) if patches % n == 0 and rows * patches <= n * max(rows, CHUNK))
    if count == 1:
        return mlp(x)
    return in_turn(mlp, lambda mlp, part: mlp(part), (x.reshape(rows, count, -1, width),)).reshape(x.shape)


class PlainMlp(nn.Module):
    """Two projections around the activation, with biases."""

    config: PatchTowerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "R P W"]) -> Float[Array, "R P W"]:
        hidden = linear(self.config.intermediate_size, self.dtype, "fc1", use_bias=True)(x)
        hidden = activation(self.config.hidden_act)(hidden)
        return linear(x.shape[-1], self.dtype, "fc2", use_bias=True)(hidden)


class GatedMlp(nn.Module):
    """down(act(gate(x)) · up(x))."""

    config: PatchTowerConfig
    dtype: jnp.dtype
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "R P W"]) -> Float[Array, "R P W"]:
        def project(features: int, name: str) -> nn.Module:
            return linear(features, self.dtype, name, use_bias=self.use_bias)

        width = self.config.intermediate_size
        gate = activation(self.config.hidden_act)(project(width, "gate_proj")(x))
        return project(x.shape[-1], "down_proj")(gate * project(width, "up_proj")(x))


class PatchMerger(nn.Module):
    """Concatenates M² normalised patches into one token of the decoder: two projections around a GELU.

    Attributes:
        features: width of the decoder.
        unit: M².
        root_mean_square: normalise by the root mean square, without a mean or a bias.
    """

    features: int
    unit: int
    dtype: jnp.dtype
    root_mean_square: bool = False
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, patches: Float[Array, "R P W"]) -> Float[Array, "R M E"]:
        norm = rms_norm if self.root_mean_square else layer_norm
        normed = norm(self.epsilon, self.dtype, "norm")(patches)
        blocks = normed.reshape(patches.shape[0], -1, self.unit * patches.shape[2])
        hidden = activation("gelu")(linear(blocks.shape[-1], self.dtype, "linear_1", use_bias=True)(blocks))
        return linear(self.features, self.dtype, "linear_2", use_bias=True)(hidden)


def tokens_by_pictures(model: nn.Module, pixels: Float[Array, "R P C"], *geometry: Array) -> Float[Array, "R M E"]:
    """The tokens of every row of patches from a model's tower and connector, a few rows at a time.

    Args:
        geometry: further arguments of the tower, with an entry for each row.
    """

    def look(model: nn.Module, *rows: Array) -> Float[Array, "R M E"]:
        return model.connector(model.vision_tower(*rows))

    return by_pictures(model, look, pixels, pixels.shape[1], *geometry)


def in_reading_order(tokens: Float[Array, "R M E"], order: Int[Array, "N 2"]) -> Float[Array, "N E"]:
    """The tokens of all rows in reading order, then filler; see `patch_rows`."""
    return tokens[order[:, 0], order[:, 1]]
