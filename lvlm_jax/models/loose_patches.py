"""Host code for images of any size as loose patches (Qwen2-VL, arXiv 2409.12191, and its descendants).

Processors return the patches of all images in one array, with `image_grid_thw`, each image's number of frames, rows and
columns of patches. M x M neighbours become one token. Patches are ordered block by block, in reading order of blocks
and inside blocks, so that M² consecutive patches make the next token.

Towers run over one padded row of patches per image (`qwen_vision`). What the tower needs to know of a patch (row,
column, whether it is filler) is computed here and has the same shape for all images of a bucket.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lvlm_jax.errors import LVLMError, shown
from lvlm_jax.models.config import DecoderConfig, activation_name
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.models.pictures import Arrays, Pictures, concatenate, grid_map, round_up_to_bucket

SMALLEST_ROW = 16  # tokens of an image are rounded up to buckets from this size on


@dataclasses.dataclass(frozen=True)
class PatchTowerConfig:
    """Sizes of a tower over loose patches.

    Attributes:
        patch_size: side of a patch in pixels.
        frames: number of frames in a patch; a still image repeats its one frame.
        merge: M, the side in patches of one token.
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
        """Number of values in a patch."""
        return 3 * self.frames * self.patch_size**2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def tower_sizes(vision: Any, hidden_size: int, intermediate_size: int) -> dict[str, Any]:
    """The fields of `PatchTowerConfig` from a transformers vision configuration; families name the two widths
    differently.

    Raises:
        LVLMError: a value that is not supported.
    """
    if vision.in_channels != 3:
        raise LVLMError(f"vision_config.in_channels {vision.in_channels} is not supported; expected 3")
    for name in ("patch_size", "temporal_patch_size"):
        if not isinstance(getattr(vision, name), int):
            raise LVLMError(f"vision_config.{name} {getattr(vision, name)} is not supported; expected one number")
    rope = getattr(vision, "rope_parameters", None) or {}
    if rope.get("rope_type", "axial") not in ("axial", "default"):
        raise LVLMError(
            f"vision_config.rope_parameters of type {rope['rope_type']!r} are not supported; expected 'axial'"
        )
    theta = rope.get("rope_theta", 10000.0)
    if not isinstance(theta, int | float) or not 0 < theta < float("inf"):
        raise LVLMError(f"vision_config.rope_parameters: rope_theta is {shown(theta)}; expected a positive number")
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
        rope_theta=float(theta),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoosePatchConfig(FamilyConfig):
    """Base configuration of the families whose towers take loose patches.

    Attributes:
        video_token_id: the token that marks a video in a prompt.
    """

    vision: PatchTowerConfig
    video_token_id: int

    def pictures(self, parts: Sequence[Arrays], prompts: Sequence[np.ndarray]) -> Pictures | None:
        """The tower's inputs, from a processor's `pixel_values` and `image_grid_thw`; None without images.

        Raises:
            LVLMError: there are videos, or patches and grids do not fit together.
        """
        refuse_videos(parts, prompts, self.video_token_id)
        pictures = patch_rows(parts, self.vision.channels, self.vision.merge)
        return None if pictures is None else self.with_geometry(pictures)

    def with_geometry(self, pictures: Pictures) -> Pictures:
        """The pictures with further geometry that the tower needs; by default none."""
        return pictures

    def blank(self) -> Pictures:
        """The smallest image, in the form of `pictures`."""
        return self.with_geometry(blank_patches(self.vision.channels, self.vision.merge))

    def token_map(self, pictures: Pictures, image: int) -> Int[np.ndarray, "H W"]:
        """For each position of the image, the index of the image token that covers it."""
        return grid_map(pictures, image)

    def shown(self, pictures: Pictures, picture: Callable[[int, int], np.ndarray]) -> Float[np.ndarray, "R P C"]:
        """Replaces every image in the pixels; `picture` returns the replacement for a height and a width."""
        return patches_of(picture, self.vision, pictures.geometry)

    def altered(
        self, pictures: Pictures, index: Int[np.ndarray, "R"], change: Callable[[Array, Array], Array]
    ) -> Float[Array, "R P C"]:
        """The pixels with every image changed, each at its own size."""
        side, pixels = self.vision.patch_size, jnp.asarray(pictures.pixels)
        for row, is_valid in enumerate(pictures.geometry["valid"]):
            if not is_valid.any():
                continue
            places = tuple(pictures.geometry["coordinates"][row, is_valid].T)
            height, width = (int(place.max()) + 1 for place in places)
            patches = pixels[row, is_valid].reshape(-1, 3, self.vision.frames, side, side)
            image = jnp.zeros((height, width, 3, side, side), pixels.dtype).at[places].set(patches[:, :, 0])
            picture = image.transpose(2, 0, 3, 1, 4).reshape(3, height * side, width * side)
            new_image = change(picture, jnp.asarray(index[row])).reshape(3, height, side, width, side)
            cut = new_image.transpose(1, 3, 0, 2, 4)[places]
            flat = jnp.repeat(cut[:, :, None], self.vision.frames, axis=2).reshape(len(patches), -1)
            pixels = pixels.at[row, np.flatnonzero(is_valid)].set(flat)
        return pixels


def check_width(vision: Any, text: DecoderConfig) -> None:
    """Checks that the tower's output has the decoder's width.

    Raises:
        LVLMError: it does not.
    """
    if vision.out_hidden_size != text.hidden_size:
        raise LVLMError(
            f"vision_config.out_hidden_size is {vision.out_hidden_size}; expected the decoder's hidden_size "
            f"{text.hidden_size}"
        )


def refuse_videos(parts: Sequence[Arrays], prompts: Sequence[np.ndarray], video_token_id: int) -> None:
    """Refuses videos.

    Raises:
        LVLMError: a prompt or a processor's arrays contain one.
    """
    video_names = [name for part in parts for name, array in part.items() if "video" in name and array is not None]
    if video_names:
        raise LVLMError(f"{video_names[0]} is given, but videos are not supported; give still images")
    if any((np.asarray(prompt) == video_token_id).any() for prompt in prompts):
        raise LVLMError(
            f"a prompt holds the video token {video_token_id}, but videos are not supported; give still images"
        )


def patch_rows(parts: Sequence[Arrays], channels: int, merge: int) -> Pictures | None:
    """One padded row of patches per image; None without images.

    Args:
        parts: with `pixel_values` `[patches, channels]` and `image_grid_thw` `[images, 3]` of a processor.
        channels: number of values in a patch.
        merge: M.

    Returns:
        Pictures with pixels `Float[R, P, channels]`, grids of tokens, and this geometry:
            coordinates `Int[R, P, 2]`: row and column of each patch in its image, 0 for filler;
            valid `Bool[R, P]`: False for filler;
            order `Int[R * P / M², 2]`: for each image token in reading order, its row and its place there; then filler.

    Raises:
        LVLMError: patches and grids do not fit together, or an image has several frames.
    """
    pixels, grids = concatenate(parts, "pixel_values"), concatenate(parts, "image_grid_thw")
    if pixels is None and grids is None:
        return None
    sizes = _check_grids(pixels, grids, channels, merge)
    counts = sizes.prod(axis=1)
    unit = merge**2
    rows, width = round_up_to_bucket(len(sizes), 1), round_up_to_bucket(int(counts.max()) // unit, SMALLEST_ROW) * unit
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
    """The smallest image, in the form of `patch_rows`."""
    pixels = np.zeros((merge**2, channels), np.float32)
    return patch_rows([{"pixel_values": pixels, "image_grid_thw": np.array([[1, merge, merge]])}], channels, merge)


def patches_of(
    picture: Callable[[int, int], np.ndarray], config: PatchTowerConfig, geometry: Mapping[str, np.ndarray]
) -> Float[np.ndarray, "R P C"]:
    """The pixels of `patch_rows` if all images were the same image.

    Args:
        picture: returns its pixel values `Float[3, height, width]` for a height and a width.
        config: sizes of patches.
        geometry: the geometry of `patch_rows`.
    """
    side, valid = config.patch_size, geometry["valid"]
    pixels = np.zeros((*valid.shape, config.channels), np.float32)
    for row, is_valid in enumerate(valid):
        if not is_valid.any():
            continue
        places = geometry["coordinates"][row, is_valid]
        height, width = places.max(axis=0) + 1
        image = picture(height * side, width * side).reshape(3, height, side, width, side)
        patches = image.transpose(1, 3, 0, 2, 4)[tuple(places.T)]
        pixels[row, is_valid] = np.repeat(patches[:, :, None], config.frames, axis=2).reshape(len(places), -1)
    return pixels


def _check_grids(pixels: np.ndarray | None, grids: np.ndarray | None, channels: int, merge: int) -> np.ndarray:
    """Rows and columns of patches of each image, `Int[I, 2]`, after checking that they fit the pixels."""
    if pixels is None or grids is None:
        missing = "pixel_values" if pixels is None else "image_grid_thw"
        raise LVLMError(f"{missing} is missing; give the processor's pixel_values and image_grid_thw together")
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
    """Row and column of each patch of an image, in the order of the processor."""
    places = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)
    blocks = places.reshape(height // merge, merge, width // merge, merge, 2)
    return blocks.swapaxes(1, 2).reshape(-1, 2)
