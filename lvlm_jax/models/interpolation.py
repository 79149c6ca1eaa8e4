"""Learned position embeddings of a square grid, resampled to the grid of each image.

Which entries of the table a patch reads, and with which weights, depends only on the size of the grid. The host
computes this, so that the device program just gathers and adds, and is the same for all images of a bucket.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lvlm_jax.models.pictures import Pictures

CUBIC = -0.75  # the free parameter of Keys' kernel (IEEE TASSP 29, 1981); the value of torch and most image libraries

Places = Float[np.ndarray, "N"]
Taps = tuple[Int[np.ndarray, "N K"], Float[np.ndarray, "N K"]]


def corner_aligned(count: int, side: int) -> Places:
    """Positions of `count` points on an axis of `side` entries; the outermost points are on its ends."""
    return np.arange(count) * ((side - 1) / max(count - 1, 1))


def center_aligned(count: int, side: int) -> Places:
    """Positions of the centers of `count` cells on an axis of `side` cells of the same total length."""
    return (np.arange(count) + 0.5) * (side / count) - 0.5


def linear_taps(places: Places, side: int) -> Taps:
    """The neighbours of each place and their weights in linear interpolation; beyond the end the last entry repeats."""
    entries = np.floor(places)[:, None] + np.arange(2)
    weights = 1 - np.abs(places[:, None] - entries)
    return np.clip(entries, 0, side - 1).astype(np.int32), weights


def cubic_taps(places: Places, side: int) -> Taps:
    """The neighbours of each place and their weights in cubic convolution."""
    entries = np.floor(places)[:, None] + np.arange(-1, 3)
    distance = np.abs(places[:, None] - entries)
    near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
    far = CUBIC * (((distance - 5) * distance + 8) * distance - 4)
    return np.clip(entries, 0, side - 1).astype(np.int32), np.where(distance <= 1, near, far)


def with_positions(
    pictures: Pictures, merge: int, side: int, place: Callable[[int, int], Places], taps: Callable[[Places, int], Taps]
) -> Pictures:
    """Adds the table entries that each patch reads to the geometry of `patch_rows`.

    Args:
        pictures: the result of `patch_rows`.
        merge: number of patches along a side of a token.
        side: number of entries along each axis of the table.
        place: `corner_aligned` or `center_aligned`.
        taps: `linear_taps` or `cubic_taps`.

    Returns:
        The pictures, with this added to the geometry:
            entries `Int[R, P, K]`: indices into the flat table;
            weights `Float[R, P, K]`: weight of each entry; zero for filler.
    """
    coordinates, valid = pictures.geometry["coordinates"], pictures.geometry["valid"]
    indices, shares = [], []
    for image, (height, width) in enumerate((pictures.grids * merge).tolist()):
        rows, columns = coordinates[image, : height * width].T
        row_entries, row_share = (array[rows] for array in taps(place(height, side), side))
        beside, beside_share = (array[columns] for array in taps(place(width, side), side))
        indices.append((row_entries[:, :, None] * side + beside[:, None, :]).reshape(len(rows), -1))
        shares.append((row_share[:, :, None] * beside_share[:, None, :]).reshape(len(rows), -1))
    entries = np.zeros((*valid.shape, indices[0].shape[1]), np.int32)
    weights = np.zeros(entries.shape, np.float32)
    entries[valid], weights[valid] = np.concatenate(indices), np.concatenate(shares)
    geometry = {**pictures.geometry, "entries": entries, "weights": weights}
    return dataclasses.replace(pictures, geometry=geometry)


class ResampledPositions(nn.Module):
    """The table; gives each patch the weighted sum of the entries it reads, in float32."""

    size: int
    width: int

    @nn.compact
    def __call__(self, entries: Int[Array, "R P K"], weights: Float[Array, "R P K"]) -> Float[Array, "R P W"]:
        table = self.param("embedding", nn.initializers.normal(0.02), (self.size, self.width))
        table = table.astype(jnp.float32)
        # Entry by entry: all K at once would take K times the memory of the tower's input.
        return sum(weights[..., k, None] * table[entries[..., k]] for k in range(entries.shape[-1]))
