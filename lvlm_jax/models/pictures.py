"""What a batch's images become on the host before a vision tower takes them: fixed shapes, whatever their sizes.

Processors hand out whole pictures, tiles or loose patches. Each family's configuration turns them into `Pictures`
(`config.pictures`); everything behind that counts rows and image tokens and knows no family.
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
        pixels: `Float[R, ...]`, the R rows of the tower's batch: whole images, tiles, or one row of patches an image.
        owner: `Int[R]`, the image each row belongs to; -1 for a row that only fills a bucket.
        token_counts: `Int[I]`, how many tokens each image takes in the prompt.
        geometry: what `encode_images` must know besides, by its keywords. Arrays with R as their first axis belong to
            the rows, others to image tokens. Zeros behind the end of any axis only add filler.
        grids: `Int[I, 2]`, rows and columns of each image's tokens, where positions have several axes; else None.
    """

    pixels: np.ndarray
    owner: np.ndarray
    token_counts: np.ndarray
    geometry: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    grids: np.ndarray | None = None


def whole_pictures(pixels: np.ndarray, tokens_per_image: int) -> Pictures:
    """One row per image, the same number of tokens for each."""
    count = len(pixels)
    return Pictures(pixels, np.arange(count), np.full(count, tokens_per_image))


def square_map(tokens: int, first: int = 0) -> Int[np.ndarray, "H W"]:
    """Which token of an image shows each place of it, where `tokens` from `first` on fill a square row by row."""
    side = math.isqrt(tokens)
    return first + np.arange(side * side).reshape(side, side)


def grid_map(pictures: Pictures, image: int) -> Int[np.ndarray, "H W"]:
    """Which token of an image shows each place of it, where all of its tokens fill its grid row by row."""
    height, width = pictures.grids[image]
    return np.arange(height * width).reshape(height, width)


def gathered(parts: Sequence[Arrays], name: str) -> list[np.ndarray]:
    """The arrays of one name of all parts that have it, pixels as float32.

    Raises:
        LVLMError: pixels that are not finite.
    """
    found = [np.asarray(part[name]) for part in parts if part.get(name) is not None]
    if name != "pixel_values":
        return found
    found = [np.asarray(array, np.float32) for array in found]
    if not all(np.isfinite(array).all() for array in found):
        raise LVLMError("pixel_values holds NaN or infinite numbers; check the pictures and their normalisation")
    return found


def joined(parts: Sequence[Arrays], name: str) -> np.ndarray | None:
    """The arrays of one name, one behind the other along the first axis; None where no part has it.

    Raises:
        LVLMError: arrays that do not fit together, or pixels that are not finite.
    """
    found = gathered(parts, name)
    if not found:
        return None
    if len({array.shape[1:] for array in found}) > 1:
        raise LVLMError(
            f"{name} has shapes {', '.join(str(array.shape) for array in found)}; expected the same behind the first"
        )
    return np.concatenate(found)


def square_pixels(parts: Sequence[Arrays], side: int, rows: str = "images") -> Float[np.ndarray, "R 3 Y X"] | None:
    """The `pixel_values` of all parts, squares of `side` pixels; None without images.

    Args:
        rows: what the error calls them.

    Raises:
        LVLMError: pixels of another shape, or that are not finite.
    """
    pixels = joined(parts, "pixel_values")
    if pixels is not None and (pixels.ndim != 4 or pixels.shape[1:] != (3, side, side)):
        raise LVLMError(f"pixel_values has shape {pixels.shape}; expected [{rows}, 3, {side}, {side}]")
    return pixels


def bucketed(count: int, smallest: int) -> int:
    """`count` rounded up to `smallest` times 1, 2, 3, 4, 6, 8, 12, ...: few programs, at most half of each idle."""
    size = smallest
    while size < count:
        size *= 2
    between = size // 4 * 3
    return between if between >= count and between % smallest == 0 else size
