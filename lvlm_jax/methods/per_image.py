"""Statistics inside each image of each sample: B samples, I images, S columns.

Images are a static axis, so there are no loops over samples or images. For missing images of a sample, the rows of
`members` are all False and sums are 0.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def members(image_id: Int[Array, "B S"], image_count: int) -> Bool[Array, "B I S"]:
    """Which columns belong to which image."""
    return image_id[:, None, :] == jnp.arange(1, image_count + 1)[None, :, None]


def sums(inside: Bool[Array, "B I S"], values: Float[Array, "B S"]) -> Float[Array, "B I"]:
    """The sum of column values over each image."""
    return jnp.where(inside, values[:, None, :], 0).sum(axis=-1)


def maxima(inside: Bool[Array, "B I S"], values: Float[Array, "B S"]) -> Float[Array, "B I"]:
    """The largest of non-negative column values of each image; 0 for an image without columns."""
    return jnp.where(inside, values[:, None, :], 0).max(axis=-1, initial=0)


def spread(inside: Bool[Array, "B I S"], of_image: Array) -> Array:
    """`[B, I]` to `[B, S]`: the value of each column's image, 0 (or False) on text columns."""
    values = jnp.where(inside, of_image[:, :, None], jnp.zeros((), of_image.dtype))
    return values.any(axis=1) if values.dtype == bool else values.sum(axis=1)


def normalised(inside: Bool[Array, "B I S"], values: Float[Array, "B S"], floor: float = 0.0) -> Float[Array, "B S"]:
    """Non-negative column values divided by their image's sum; all 0 in an image whose sum is at most `floor`."""
    total = spread(inside, sums(inside, values))
    enough = total > floor
    return jnp.where(enough, values / jnp.where(enough, total, 1), 0)


def share(rho: float | np.floating | Array, inside: Bool[Array, "B I S"]) -> Int[Array, "B I"]:
    """floor(ρ N) of each image's N columns, at least one."""
    count = inside.sum(axis=-1)
    # A float32 ρ may be slightly below the intended decimal number: 0.9 of 10 columns are 9.
    count_kept = jnp.floor(rho * (1 + 2e-7) * count)
    return jnp.clip(count_kept, 1, jnp.maximum(count, 1)).astype(jnp.int32)


def largest(
    image_id: Int[Array, "B S"], inside: Bool[Array, "B I S"], values: Float[Array, "B S"], keep: Int[Array, "B I"]
) -> Bool[Array, "B S"]:
    """Marks the `keep` columns with the largest values in each image; on ties the earlier. One sort."""
    order = jnp.lexsort((-values, image_id), axis=-1)  # stable: by image, then by decreasing value
    sorted_id = jnp.take_along_axis(image_id, order, axis=-1)
    sorted_inside = members(sorted_id, inside.shape[1])
    images = jnp.arange(1, inside.shape[1] + 1)
    first = (image_id[:, None, :] < images[None, :, None]).sum(axis=-1)
    last = spread(sorted_inside, (first + keep).astype(jnp.int32))
    is_kept = jnp.arange(image_id.shape[1])[None, :] < last  # `last` is 0 outside images
    return jnp.put_along_axis(jnp.zeros_like(is_kept), order, is_kept, axis=-1, inplace=False)
