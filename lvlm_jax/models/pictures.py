"""`Pictures`: the images of a batch on the host, as input of a vision tower, in fixed shapes whatever their sizes.

Processors return whole images, tiles or loose patches. Each family's configuration turns them into `Pictures`
(`config.pictures`); later code counts rows and image tokens and does not depend on the family.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from lvlm_jax.errors import LVLMError

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The I images of a batch, in reading order. Host arrays.

    Attributes:
        pixels: `Float[R, ...]`, the R rows of the tower's batch: whole images, tiles, or one row of patches per image.
        owner: `Int[R]`, the image each row belongs to; -1 for a filler row.
        token_counts: `Int[I]`, how many tokens each image takes in the prompt.
        geometry: further keyword arguments of `encode_images`. Arrays whose first axis has size R belong to the rows,
            others to image tokens. Zeros appended along any axis only add filler.
        grids: `Int[I, 2]`, rows and columns of each image's tokens, if positions have several axes; else None.
    """

    pixels: np.ndarray
    owner: np.ndarray
    token_counts: np.ndarray
    geometry: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    grids: np.ndarray | None = None


def whole_pictures(pixels: np.ndarray, tokens_per_image: int) -> Pictures:
    """One row per image, with the same number of tokens each."""
    count = len(pixels)
    return Pictures(pixels, np.arange(count), np.full(count, tokens_per_image))


def square_map(tokens: int, first: int = 0) -> Int[np.ndarray, "H W"]:
    """The image token that shows each place of the image, if `tokens` tokens from `first` on fill a square by rows."""
    side = math.isqrt(tokens)
    return first + np.arange(side * side).reshape(side, side)


def grid_map(pictures: Pictures, image: int) -> Int[np.ndarray, "H W"]:
    """The image token that shows each place of the image, if all its tokens fill its grid row by row."""
    height, width = pictures.grids[image]
    return np.arange(height * width).reshape(height, width)


def named_arrays(parts: Sequence[Arrays], name: str) -> list[np.ndarray]:
    """The arrays called `name` of all parts that have it; pixels as float32.

    Raises:
        LVLMError: some pixels are not finite.
    """
    arrays = [np.asarray(part[name]) for part in parts if part.get(name) is not None]
    if name != "pixel_values":
        return arrays
    arrays = [np.asarray(array, np.float32) for array in arrays]
    if not all(np.isfinite(array).all() for array in arrays):
        raise LVLMError("pixel_values has NaN or infinite numbers; check the images and their normalisation")
    return arrays


def concatenate(parts: Sequence[Arrays], name: str) -> np.ndarray | None:
    """Concatenates the arrays called `name` along the first axis; None if no part has it.

    Raises:
        LVLMError: the arrays do not fit together, or some pixels are not finite.
    """
    arrays = named_arrays(parts, name)
    if not arrays:
        return None
    if len({array.shape[1:] for array in arrays}) > 1:
        raise LVLMError(
            f"{name} has shapes {', '.join(str(array.shape) for array in arrays)}; expected the same after the first "
            "axis"
        )
    return np.concatenate(arrays)


def square_pixels(parts: Sequence[Arrays], side: int, rows: str = "images") -> Float[np.ndarray, "R 3 Y X"] | None:
    """The `pixel_values` of all parts, squares of `side` pixels; None without images.

    Args:
        parts: the processor's arrays.
        side: expected side in pixels.
        rows: name of the rows in the error message.

    Raises:
        LVLMError: pixels have another shape or are not finite.
    """
    pixels = concatenate(parts, "pixel_values")
    if pixels is not None and (pixels.ndim != 4 or pixels.shape[1:] != (3, side, side)):
        raise LVLMError(f"pixel_values has shape {pixels.shape}; expected [{rows}, 3, {side}, {side}]")
    return pixels


def round_up_to_bucket(count: int, smallest: int) -> int:
    """Rounds `count` up to `smallest` times 1, 2, 3, 4, 6, 8, 12, ...: few programs, with at most half of a bucket
    idle."""
    size = smallest
    while size < count:
        size *= 2
    between = size // 4 * 3
    return between if between >= count and between % smallest == 0 else size
