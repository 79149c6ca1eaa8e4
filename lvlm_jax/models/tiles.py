"""Any-resolution tiling (LLaVA-NeXT, llava-vl.github.io/blog/2024-01-30-llava-next): which patch each image token
shows.

The tower sees an image twice: the whole image, squeezed into one tile, and the image enlarged to the best of a list of
resolutions, split into tiles. The image tokens are the patches of the first view, then those of the second, row by row
across the tiles, without the border that keeps the aspect ratio; a token ends each row. This arithmetic on sizes runs
here on the host. A model runs its tower over the tiles and looks its tokens up in a table of rows: row `NEWLINE` is the
token that ends a row, and after it come the patches of all tiles in order.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.interpolation import linear_taps
from lvlm_jax.models.pictures import Arrays, Pictures, concatenate, named_arrays, round_up_to_bucket

NEWLINE = 0


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How images are split into tiles.

    Attributes:
        tile: pixels along a tile's side.
        side: patches along a tile's side.
        resolutions: sizes that an image may be enlarged to, (height, width) in pixels.
    """

    tile: int
    side: int
    resolutions: tuple[tuple[int, int], ...]

    @classmethod
    def from_hf(cls, hf: Any) -> "Tiling":
        """Reads the `image_grid_pinpoints` and `vision_config` of a transformers configuration.

        Raises:
            LVLMError: a resolution is not a whole number of tiles.
        """
        tile = hf.vision_config.image_size
        resolutions = tuple(tuple(sides) for sides in hf.image_grid_pinpoints)
        for sides in resolutions or ((),):
            if len(sides) != 2 or any(side < 1 or side % tile for side in sides):
                raise LVLMError(
                    f"image_grid_pinpoints entry {list(sides)} is not supported; expected [height, width], multiples "
                    f"of the tower's image_size {tile}"
                )
        return cls(tile, tile // hf.vision_config.patch_size, resolutions)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tiles of the best resolution: it keeps most of an image's pixels and, on ties, wastes the
        fewest.

        Args:
            size: size of the image, (height, width) in pixels.

        Raises:
            LVLMError: the image is so narrow that no resolution keeps any of it.
        """
        height, width = size

        def kept_and_waste(resolution: tuple[int, int]) -> tuple[int, int]:
            scale = min(resolution[1] / width, resolution[0] / height)
            effective = min(int(width * scale) * int(height * scale), width * height)
            return effective, effective - resolution[0] * resolution[1]

        best = max(self.resolutions, key=kept_and_waste)
        if kept_and_waste(best)[0] == 0:
            raise LVLMError(f"an image of {width} x {height} pixels is too narrow to be cut into tiles; crop it")
        return best[0] // self.tile, best[1] // self.tile

    def overview(self, tile: int) -> Int[np.ndarray, "N"]:
        """The table rows of a tile's patches."""
        return NEWLINE + 1 + tile * self.side**2 + np.arange(self.side**2)

    def enlarged(self, first: int, size: tuple[int, int]) -> Int[np.ndarray, "Y X"]:
        """The table rows of the patches that show an image of `size` in its tiles from `first` on, as a map without
        border.

        Raises:
            LVLMError: as `grid`.
        """
        down, across = self.grid(size)
        patches = NEWLINE + 1 + first * self.side**2 + np.arange(down * across * self.side**2)
        patches = patches.reshape(down, across, self.side, self.side).swapaxes(1, 2)
        return unpadded(patches.reshape(down * self.side, across * self.side), size)

    def read(self, parts: Sequence[Arrays]) -> tuple[np.ndarray, list[tuple[int, int]]] | None:
        """Tiles `[I, tiles, 3, Y, X]` and sizes in pixels of all images; None without images.

        Raises:
            LVLMError: arrays are missing, have other shapes, or are not finite.
        """
        images = named_arrays(parts, "pixel_values")
        if not images:
            return None
        for array in images:
            if array.ndim != 5 or array.shape[2:] != (3, self.tile, self.tile):
                raise LVLMError(
                    f"pixel_values has shape {array.shape}; expected [images, tiles, 3, {self.tile}, {self.tile}]"
                )
        tile_count = max(array.shape[1] for array in images)
        images = [np.pad(array, [(0, 0), (0, tile_count - array.shape[1])] + [(0, 0)] * 3) for array in images]
        pixels, sizes = np.concatenate(images), concatenate(parts, "image_sizes")
        if sizes is None:
            raise LVLMError("image_sizes is missing; give the processor's [images, 2], heights and widths in pixels")
        if sizes.shape != (len(pixels), 2) or sizes.dtype.kind not in "iu" or (sizes < 1).any():
            raise LVLMError(
                f"image_sizes has shape {sizes.shape} and dtype {sizes.dtype}; expected one positive height and width "
                f"for each of the {len(pixels)} images of pixel_values"
            )
        return pixels, [(int(height), int(width)) for height, width in sizes]

    def blank(self) -> Arrays:
        """A processor's arrays for one empty image of the fewest tiles."""
        size = min(self.resolutions, key=math.prod)
        down, across = self.grid(size)
        pixels = np.zeros((1, 1 + down * across, 3, self.tile, self.tile), np.float32)
        return {"pixel_values": pixels, "image_sizes": np.array([size])}

    def packed(self, pixels: np.ndarray, tiles: Sequence[int], **tokens: Sequence[np.ndarray]) -> Pictures:
        """Packs the first `tiles[i]` tiles of each image i, with the arrays that define its tokens.

        An image has at most one token per patch and one newline per row of each tile, so the program depends only on
        the number of tiles.

        Args:
            pixels: `Float[I, tiles, 3, Y, X]`.
            tiles: how many tiles each image has.
            tokens: arrays with one row per token, one array per image, which are concatenated under their name.

        Raises:
            LVLMError: an image has fewer tiles than its size requires.
        """
        if max(tiles) > pixels.shape[1]:
            raise LVLMError(
                f"image {int(np.argmax(tiles)) + 1} of the batch has {pixels.shape[1]} tiles and its image_sizes call "
                f"for {max(tiles)}; give pixel_values and image_sizes of the same processor call"
            )
        count = sum(tiles)
        rows = round_up_to_bucket(count, 1)
        chosen = np.arange(pixels.shape[1]) < np.asarray(tiles)[:, None]
        padded = np.zeros((rows, *pixels.shape[2:]), np.float32)
        padded[:count] = pixels[chosen]
        owner = np.full(rows, -1)
        owner[:count] = np.repeat(np.arange(len(tiles)), tiles)
        length = rows * self.side * (self.side + 1)

        def joint(arrays: Sequence[np.ndarray]) -> np.ndarray:
            flat = np.concatenate(arrays)
            return np.pad(flat, [(0, length - len(flat))] + [(0, 0)] * (flat.ndim - 1))

        counts = np.array([len(array) for array in next(iter(tokens.values()))])
        return Pictures(padded, owner, counts, {name: joint(arrays) for name, arrays in tokens.items()})


def unpadded(patches: Int[np.ndarray, "H W"], size: tuple[int, int]) -> Int[np.ndarray, "Y X"]:
    """The middle part of a map that an image of `size` (height, width) fills without changing its aspect ratio."""
    (down, across), (height, width) = patches.shape, size
    if width / height > across / down:
        # Rounded like the processors do, which write as many placeholders.
        border = (down - int(round(height * (across / width), 7))) // 2
        return patches[border : down - border]
    border = (across - int(round(width * (down / height), 7))) // 2
    return patches[:, border : across - border]


def bilinear(
    patches: Int[np.ndarray, "H W"], height: int, width: int
) -> tuple[Int[np.ndarray, "Y X 4"], Float[np.ndarray, "Y X 4"]]:
    """The four rows that each point of a resized map mixes, and their weights; no smoothing."""

    def taps(size: int, target: int) -> tuple[np.ndarray, np.ndarray]:
        # Centers, not corners, are aligned. Rounded to float32 where torch rounds, which changes the weights far from
        # the origin.
        scale = float(np.float32(size) / np.float32(target))
        return linear_taps(((np.arange(target) + 0.5) * scale - 0.5).astype(np.float32), size)

    (rows, down), (columns, across) = taps(patches.shape[0], height), taps(patches.shape[1], width)
    index = patches[rows[:, None, :, None], columns[None, :, None, :]]
    weights = (down[:, None, :, None] * across[None, :, None, :]).astype(np.float32)
    return index.reshape(height, width, 4), weights.reshape(height, width, 4)


def with_newlines(tokens: np.ndarray, newline: Any) -> np.ndarray:
    """A map `[Y, X, ...]` row by row, each row followed by `newline`, as `[Y (X + 1), ...]`."""
    end = np.broadcast_to(np.asarray(newline, tokens.dtype), (len(tokens), 1, *tokens.shape[2:]))
    return np.concatenate([tokens, end], axis=1).reshape(-1, *tokens.shape[2:])
