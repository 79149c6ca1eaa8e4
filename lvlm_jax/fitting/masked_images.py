"""VTI's measurement in the vision tower: its states on masked copies of an image minus those on the image.

In each copy, the mean color of the image replaces 99 % of the patches. Images in tiles are masked tile by tile.
"""

import functools
import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lvlm_jax import LVLM
from lvlm_jax.generation import forward
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.models.vision import CHUNK, layer_outputs
from lvlm_jax.training.data.pair_files import Pair

COPIES = 50  # masked copies of an image, as many as the authors' scripts make
MASKED = 0.99  # share of the patches that are masked in each


def differences(model: LVLM, pairs: Sequence[Pair], seed: int) -> Float[np.ndarray, "I L W"]:
    """For each image of the pairs and each layer of the tower: its output on the masked copies minus that on the image.

    Both are averaged over patches.

    Args:
        model: the model.
        pairs: with I images.
        seed: seed of the masks, which depend only on it, the pair's id, and the place of the image or tile in the pair.
    """
    config = model.config
    inputs = model.prepare([pair.conversation() for pair in pairs])
    counts = np.maximum(inputs.image_id, 0).max(axis=1)
    ids = [pair.id for pair, count in zip(pairs, counts, strict=True) for _ in range(count)]
    by_image: list[list[np.ndarray]] = [[] for _ in ids]
    valid = _valid_patches(config, inputs.pixels, inputs.geometry)
    for row in np.flatnonzero(inputs.owner >= 0):
        image, rows = inputs.owner[row], len(inputs.pixels)
        masks = draw_masks(seed, ids[image], int(inputs.image_index[row]), valid[row])
        geometry = {name: one[row : row + 1] if len(one) == rows else one for name, one in inputs.geometry.items()}
        difference = _row_difference(model.params, config, inputs.pixels[row], geometry, valid[row], masks)
        by_image[image].append(np.asarray(difference))
    return np.stack([np.mean(rows, axis=0) for rows in by_image])


def draw_masks(seed: int, pair_id: str, place: int, valid: Bool[np.ndarray, " P"]) -> Bool[np.ndarray, "N P"]:
    """Which patches each copy loses.

    Args:
        seed: a seed.
        pair_id: the pair's id.
        place: of the image or tile in the pair.
        valid: patches that are not filler; the others are never masked.
    """
    key = int.from_bytes(hashlib.blake2b(pair_id.encode(), digest_size=8).digest(), "big")
    random, patches = np.random.default_rng([seed, key, place]), np.flatnonzero(valid)
    masks = np.zeros((COPIES, len(valid)), bool)
    for mask in masks:
        mask[random.permutation(patches)[: int(MASKED * len(patches))]] = True
    return masks


def _valid_patches(config: FamilyConfig, pixels: np.ndarray, geometry: dict) -> Bool[np.ndarray, "R P"]:
    valid = config.valid_patches(geometry)
    if valid is not None:
        return valid
    side = config.vision.patch_size
    return np.ones((len(pixels), (pixels.shape[2] // side) * (pixels.shape[3] // side)), bool)


@functools.partial(jax.jit, static_argnames="config")
def _row_difference(
    params: dict,
    config: FamilyConfig,
    pixels: Float[Array, "..."],
    geometry: dict[str, Array],
    valid: Bool[Array, " P"],
    masks: Bool[Array, "N P"],
) -> Float[Array, "L W"]:
    """The difference for one row of the tower's pixels, with the geometry of this row."""

    def mean_states(pixels: Float[Array, "..."]) -> Float[Array, "L W"]:
        outputs = layer_outputs(lambda: forward.encode_images(params, config, pixels[None], geometry))
        # A class token counts as a patch.
        weights = valid if outputs[0].shape[1] == len(valid) else jnp.ones(outputs[0].shape[1])
        return jnp.stack([jnp.average(output[0].astype(jnp.float32), axis=0, weights=weights) for output in outputs])

    def on_copy(mask: Bool[Array, " P"]) -> Float[Array, "L W"]:
        return mean_states(masked(pixels, mask, valid, config.vision.patch_size))

    at_a_time = max(1, CHUNK // len(valid))
    return jax.lax.map(on_copy, masks, batch_size=at_a_time).mean(axis=0) - mean_states(pixels)


def masked(
    pixels: Float[Array, "..."], mask: Bool[Array, " P"], valid: Bool[Array, " P"], patch_size: int
) -> Float[Array, "..."]:
    """The pixels with masked patches set to the mean of each color channel.

    Args:
        pixels: of one image or tile `[3, Y, X]`, or loose patches `[P, C]`.
        mask: patches to set, row by row in an image.
        valid: patches that are not filler, over which the mean is taken.
        patch_size: in pixels.
    """
    if pixels.ndim == 2:
        by_channel = pixels.reshape(len(mask), 3, -1)
        mean = jnp.average(by_channel.mean(axis=2), axis=0, weights=valid)
        return jnp.where(mask[:, None, None], mean[:, None], by_channel).reshape(pixels.shape)
    down, across = (side // patch_size for side in pixels.shape[1:])
    rest = [(0, side % patch_size) for side in pixels.shape[1:]]  # pixels that belong to no patch

    def of_pixels(patches: Bool[Array, " P"], value: bool) -> Bool[Array, "Y X"]:
        grid = patches.reshape(down, across).repeat(patch_size, axis=0).repeat(patch_size, axis=1)
        return jnp.pad(grid, rest, constant_values=value)

    mean = jnp.average(pixels, axis=(1, 2), weights=jnp.broadcast_to(of_pixels(valid, True), pixels.shape))
    return jnp.where(of_pixels(mask, False), mean[:, None, None], pixels)
