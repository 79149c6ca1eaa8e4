"""Where the weight goes: mass on images, and maps over the patches of each image.

Attention here is that of one branch, `step.tapped.attention[:, 0]`: Float[L B H R S], after all edits of a method.
`image_id` says what the S columns are: 0 text, k >= 1 the k-th image, -1 padding or not written yet.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lvlm_jax.analysis.words import Word


def image_mass(
    attention: Float[Array, "L B H R S"], image_id: Int[Array, "B S"], image: int | None = None
) -> Float[Array, "L B H R"]:
    """The share of a row's weight that lies on image columns.

        mass = Σ_{j in image} w_j / Σ_j w_j

    Weights behind a softmax sum to one already; the division matters for methods that edit them afterwards.

    Args:
        attention: weights.
        image_id: what each column is.
        image: which image, from 1; None for all of them together.
    """
    chosen = image_id > 0 if image is None else image_id == image
    on_image = jnp.where(chosen[None, :, None, None, :], attention, 0.0).sum(-1)
    total = jnp.where(image_id[None, :, None, None, :] >= 0, attention, 0.0).sum(-1)
    return on_image / jnp.where(total > 0, total, 1.0)


def patch_maps(
    attention: Float[np.ndarray, "*any N"], images: int, grid: tuple[int, int]
) -> Float[np.ndarray, "*any I h w"]:
    """Weights on the N image tokens of one conversation, as a map over each image's patches.

    Args:
        attention: weights on image tokens in order, those of all images, as `LVLM.attention` returns them.
        images: how many images the tokens belong to.
        grid: rows and columns of patches of one image. A class token before them, which feature selection "full"
            keeps, is left out.
    """
    height, width = grid
    each = attention.reshape(*attention.shape[:-1], images, -1)
    return each[..., -height * width :].reshape(*attention.shape[:-1], images, height, width)


def word_maps(maps: Float[np.ndarray, "T *any"], words: list[Word]) -> Float[np.ndarray, "W *any"]:
    """The mean over each word's tokens: one entry for each of W words, from one for each of T answer tokens.

    The row of a token is the one that produced it, so a word's map is where the model looked before it wrote the word.
    """
    if not words:
        return np.zeros((0, *maps.shape[1:]), maps.dtype)
    return np.stack([maps[list(word.tokens)].mean(0) for word in words])
