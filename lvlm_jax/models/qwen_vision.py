"""What the towers of Qwen2-VL (arXiv 2409.12191) and its descendants share: pictures of any size as loose patches.

Processors hand out the patches of all images one behind the other, with `image_grid_thw`, each image's frames, rows and
columns of patches. M x M neighbours become one token: patches come block by block, blocks in reading order, and in
reading order inside a block, so that M² consecutive patches make the next token.

The tower runs over one padded row of patches per image. What a patch needs to know of its picture (row, column, whether
it is one at all) is worked out on the host and has the same shape for all pictures of a bucket.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.attention.rotary import RopeConfig, Rotation, frequencies, rotate
from lvlm_jax.errors import LVLMError
from lvlm_jax.models.config import activation_name
from lvlm_jax.models.layers import activation, layer_norm, linear, rms_norm
from lvlm_jax.models.pictures import Arrays, Pictures, bucketed, joined
from lvlm_jax.models.vision import patch_attention

SMALLEST_ROW = 16  # tokens of an image, rounded up to buckets from here
QUERY_BLOCK = 1024  # patches that attend at a time: bounds the logits in memory


@dataclasses.dataclass(frozen=True)
class PatchTowerConfig:
    """Sizes of a tower over loose patches.

    Attributes:
        patch_size: side of a patch in pixels.
        frames: frames that a patch is deep; a still image repeats its one.
        merge: M, the side in patches of what becomes one token.
        rope_theta: base wavelength of rows and columns.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    frames: int
    merge: int
    hidden_act: str
    rope_theta: float

    @property
    def channels(self) -> int:
        """Numbers in a patch."""
        return 3 * self.frames * self.patch_size**2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def tower_sizes(vision: Any, hidden_size: int, intermediate_size: int) -> dict[str, Any]:
    """The fields of `PatchTowerConfig` of a transformers vision configuration, whose names for widths differ.

    Raises:
        LVLMError: a value that is not supported.
    """
    if vision.in_channels != 3:
        raise LVLMError(f"vision_config.in_channels {vision.in_channels} is not supported; expected 3")
    for name in ("patch_size", "temporal_patch_size"):
        if not isinstance(getattr(vision, name), int):
            raise LVLMError(
                f"vision_config.{name} {getattr(vision, name)} is not supported; expected one number"
            )
    rope = getattr(vision, "rope_parameters", None) or {}
    if rope.get("rope_type", "axial") not in ("axial", "default"):
        raise LVLMError(
            f"vision_config.rope_parameters of type {rope['rope_type']!r} are not supported; expected 'axial'"
        )
    if hidden_size % (4 * vision.num_heads):
        raise LVLMError(
            f"a vision tower of width {hidden_size} with {vision.num_heads} heads is not supported; "
            "expected heads of a multiple of 4 channels"
        )
    return dict(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=vision.depth,
        num_heads=vision.num_heads,
        patch_size=vision.patch_size,
        frames=vision.temporal_patch_size,
        merge=vision.spatial_merge_size,
        hidden_act=activation_name("vision_config.hidden_act", vision.hidden_act),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
    )


def refuse_videos(parts: Sequence[Arrays], prompts: Sequence[np.ndarray], video_token_id: int) -> None:
    """Videos are not read.

    Raises:
        LVLMError: a prompt or a processor's arrays hold one.
    """
    given = [name for part in parts for name, array in part.items() if "video" in name and array is not None]
    if given:
        raise LVLMError(f"{given[0]} is given, but videos are not supported; give still images")
    if any((np.asarray(prompt) == video_token_id).any() for prompt in prompts):
        raise LVLMError(
            f"a prompt holds the video token {video_token_id}, but videos are not supported; give still images"
        )


def patch_rows(parts: Sequence[Arrays], channels: int, merge: int) -> Pictures | None:
    """One padded row of patches per image; None without images.

    Args:
        parts: with `pixel_values` `[patches, channels]` and `image_grid_thw` `[images, 3]` of a processor.
        channels: numbers in a patch.
        merge: M.

    Returns:
        Pictures with pixels `Float[R, P, channels]`; grids of tokens; and the geometry
            coordinates `Int[R, P, 2]`: row and column of each patch in its picture, 0 for filler;
            valid `Bool[R, P]`: False for patches that only fill;
            order `Int[R * P / M², 2]`: for each image token in reading order its row and its place there, then filler.

    Raises:
        LVLMError: patches and grids that do not fit together, or several frames.
    """
    pixels, grids = joined(parts, "pixel_values"), joined(parts, "image_grid_thw")
    if pixels is None and grids is None:
        return None
    sizes = _checked_grids(pixels, grids, channels, merge)
    counts = sizes.prod(axis=1)
    unit = merge**2
    rows, width = bucketed(len(sizes), 1), bucketed(int(counts.max()) // unit, SMALLEST_ROW) * unit
    padded = np.zeros((rows, width, channels), np.float32)
    coordinates = np.zeros((rows, width, 2), np.int32)
    valid = np.arange(width) < np.pad(counts, (0, rows - len(sizes)))[:, None]
    padded[valid] = pixels
    coordinates[valid] = np.concatenate([patch_coordinates(*size, merge) for size in sizes.tolist()])
    tokens = np.argwhere(valid[:, ::unit])
    return Pictures(
        pixels=padded,
        owner=np.where(np.arange(rows) < len(sizes), np.arange(rows), -1),
        token_counts=counts // unit,
        geometry={
            "coordinates": coordinates,
            "valid": valid,
            "order": np.pad(tokens, ((0, rows * width // unit - len(tokens)), (0, 0))).astype(np.int32),
        },
        grids=sizes // merge,
    )


def blank_patches(channels: int, merge: int) -> Pictures:
    """The smallest image, as `patch_rows` would give it."""
    pixels = np.zeros((merge**2, channels), np.float32)
    return patch_rows(
        [{"pixel_values": pixels, "image_grid_thw": np.array([[1, merge, merge]])}], channels, merge
    )


def patches_of(
    picture: Callable[[int, int], np.ndarray], config: PatchTowerConfig, geometry: Mapping[str, np.ndarray]
) -> Float[np.ndarray, "R P C"]:
    """The pixels of `patch_rows` if all images were one picture.

    Args:
        picture: gives its pixel values `Float[3, height, width]` at a height and a width.
        config: sizes of patches.
        geometry: of `patch_rows`.
    """
    side, valid = config.patch_size, geometry["valid"]
    pixels = np.zeros((*valid.shape, config.channels), np.float32)
    for row, kept in enumerate(valid):
        if not kept.any():
            continue
        places = geometry["coordinates"][row, kept]
        height, width = places.max(axis=0) + 1
        whole = picture(height * side, width * side).reshape(3, height, side, width, side)
        patches = whole.transpose(1, 3, 0, 2, 4)[tuple(places.T)]
        pixels[row, kept] = np.repeat(patches[:, :, None], config.frames, axis=2).reshape(len(places), -1)
    return pixels


def _checked_grids(
    pixels: np.ndarray | None, grids: np.ndarray | None, channels: int, merge: int
) -> np.ndarray:
    """Rows and columns of patches of each image, `Int[I, 2]`, which fit the pixels."""
    if pixels is None or grids is None:
        missing = "pixel_values" if pixels is None else "image_grid_thw"
        raise LVLMError(
            f"{missing} is missing; give the processor's pixel_values and image_grid_thw together"
        )
    if pixels.ndim != 2 or pixels.shape[1] != channels:
        raise LVLMError(f"pixel_values has shape {pixels.shape}; expected [patches, {channels}]")
    if grids.ndim != 2 or grids.shape[1] != 3 or not np.issubdtype(grids.dtype, np.integer):
        raise LVLMError(
            f"image_grid_thw has shape {grids.shape} and dtype {grids.dtype}; expected whole numbers [images, 3]"
        )
    for frames, *size in grids.tolist():
        if frames != 1:
            raise LVLMError(
                f"image_grid_thw holds an image of {frames} frames; videos are not supported, give still images"
            )
        if min(size) < 1 or any(side % merge for side in size):
            raise LVLMError(
                f"image_grid_thw holds a grid of {size[0]} x {size[1]} patches; expected multiples of {merge}"
            )
    sizes = grids[:, 1:].astype(np.int64)
    if sizes.prod(axis=1).sum() != len(pixels):
        raise LVLMError(
            f"pixel_values has {len(pixels)} patches and image_grid_thw asks for {sizes.prod(axis=1).sum()}; "
            "give both as the processor returned them"
        )
    return sizes


def patch_coordinates(height: int, width: int, merge: int) -> Int[np.ndarray, "P 2"]:
    """Row and column of each patch of a picture, in the order of the processor."""
    places = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)
    blocks = places.reshape(height // merge, merge, width // merge, merge, 2)
    return blocks.swapaxes(1, 2).reshape(-1, 2)


def axial_rotation(coordinates: Int[Array, "R P 2"], head_dim: int, theta: float) -> Rotation:
    """Rotary positions of a plane: a quarter of each head turns with the row, a quarter with the column, twice."""
    frequency = frequencies(RopeConfig(theta=theta), head_dim // 2)
    angle = coordinates.astype(jnp.float32)[..., None] * frequency
    angle = angle.reshape(*coordinates.shape[:2], -1)
    return Rotation(jnp.cos(angle), jnp.sin(angle)).heads(axis=2)


def grouped_attention(
    query: Float[Array, "R P H D"],
    key: Float[Array, "R P H D"],
    value: Float[Array, "R P H D"],
    groups: Int[Array, "R P"],
) -> Float[Array, "R P H D"]:
    """Each patch attends to those of its row that have its group number; a block of queries at a time."""

    def attended(block: tuple[Float[Array, "R Q H D"], Int[Array, "R Q"]]) -> Float[Array, "R Q H D"]:
        return patch_attention(block[0], key, value, block[1][:, :, None] == groups[:, None, :])

    patches = query.shape[1]
    if patches <= QUERY_BLOCK:
        return attended((query, groups))
    size = math.gcd(patches, QUERY_BLOCK)

    def split(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array.reshape(array.shape[0], -1, size, *array.shape[2:]), 1, 0)

    # The backward pass recomputes a block's weights, or all of them would be kept.
    blocks = jax.lax.map(jax.checkpoint(attended), (split(query), split(groups)))
    return jnp.moveaxis(blocks, 0, 1).reshape(query.shape)


def picture_groups(valid: Bool[Array, "R P"]) -> Int[Array, "R P"]:
    """Groups for attention over whole pictures; filler keeps to itself."""
    return jnp.where(valid, 0, -1)


def window_groups(
    coordinates: Int[Array, "R P 2"], valid: Bool[Array, "R P"], side: int
) -> Int[Array, "R P"]:
    """Groups for attention inside windows of `side` x `side` patches, cut off at the picture's end."""
    window = coordinates // side
    # Wider than any picture is in windows, so that numbers are unique.
    return jnp.where(valid, window[..., 0] * 2**15 + window[..., 1], -1)


class PatchEmbedding(nn.Module):
    """Patches projected to the width of the tower."""

    config: PatchTowerConfig
    dtype: jnp.dtype
    use_bias: bool = False

    @nn.compact
    def __call__(self, patches: Float[Array, "R P C"]) -> Float[Array, "R P W"]:
        config = self.config
        # The shape of checkpoints, so that it moves between them by a permutation.
        shape = (3, config.frames, config.patch_size, config.patch_size, config.hidden_size)
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape).reshape(-1, config.hidden_size)
        precision = jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
        embedded = jnp.dot(patches.astype(self.dtype), kernel.astype(self.dtype), precision=precision)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (config.hidden_size,))
            embedded = embedded + bias.astype(self.dtype)
        return embedded


class PatchAttention(nn.Module):
    """Multi-head attention with rotary rows and columns, inside groups of patches."""

    config: PatchTowerConfig
    dtype: jnp.dtype
    use_bias: bool = True
    output_bias: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "R P W"], rotation: Rotation, groups: Int[Array, "R P"]
    ) -> Float[Array, "R P W"]:
        def project(name: str) -> Float[Array, "R P H D"]:
            flat = linear(x.shape[-1], self.dtype, name, use_bias=self.use_bias)(x)
            return flat.reshape(*x.shape[:2], self.config.num_heads, -1)

        query, key = rotate(project("q_proj"), rotation), rotate(project("k_proj"), rotation)
        mixed = grouped_attention(query, key, project("v_proj"), groups)
        output = linear(x.shape[-1], self.dtype, "out_proj", use_bias=self.output_bias)
        return output(mixed.reshape(x.shape))


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
    """M² normalised patches side by side to one token of the decoder: two projections around a GELU.

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


def in_reading_order(tokens: Float[Array, "R M E"], order: Int[Array, "N 2"]) -> Float[Array, "N E"]:
    """The tokens of all rows, those of images first; see `patch_rows`."""
    return tokens[order[:, 0], order[:, 1]]
