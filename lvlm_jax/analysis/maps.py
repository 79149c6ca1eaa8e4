"""Where attention goes: mass on images, and maps over the patches of each image.

Attention here is that of one branch, `step.tapped.attention[:, 0]`: Float[L B H R S], after all edits of a method.
`image_id` gives the kind of each of the S columns: 0 for text, k >= 1 for the k-th image, -1 for padding and columns
that are not written yet.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lvlm_jax.analysis.words import Word
from lvlm_jax.errors import LVLMError
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors.layout import Inputs


def image_mass(
    attention: Float[Array, "L B H R S"], image_id: Int[Array, "B S"], image: int | None = None
) -> Float[Array, "L B H R"]:
    """The share of a row's weight that lies on image columns.

        mass = Σ_{j in image} w_j / Σ_j w_j

    Weights after a softmax sum to one; the division matters for methods that edit them afterwards.

    Args:
        attention: weights.
        image_id: 0 for text, k >= 1 for the k-th image, -1 for padding.
        image: which image, from 1; None for all of them together.
    """
    chosen = image_id > 0 if image is None else image_id == image
    on_image = jnp.where(chosen[None, :, None, None, :], attention, 0.0).sum(-1)
    total = jnp.where(image_id[None, :, None, None, :] >= 0, attention, 0.0).sum(-1)
    return on_image / jnp.where(total > 0, total, 1.0)


def token_places(config: FamilyConfig, prompt: Inputs, images: int) -> list[Int[np.ndarray, "h w"]]:
    """For each image of one conversation, a grid with the number of the image token at each place.

    The grid of an image that is split into tiles has the tokens of the view of the whole image. Tokens are numbered as
    in `LVLM.attention`, through all images.

    Args:
        config: the model's configuration.
        prompt: the result of `LVLM.prepare` for the conversation.
        images: number of images in the conversation.

    Raises:
        LVLMError: the family's image tokens show no place of the image, or the prompt has more images than the
            conversation.
    """
    pictures = prompt.pictures
    if pictures is None:
        return []
    if len(pictures.token_counts) != images:
        raise LVLMError(
            f"the prompt has {len(pictures.token_counts)} images for {images} pictures, so that no map belongs to a "
            "picture; turn off that the processor adds crops as images (do_pan_and_scan)"
        )
    maps = [config.token_map(pictures, image) for image in range(len(pictures.token_counts))]
    if any(places is None for places in maps):
        raise LVLMError(
            f"image tokens of {config.model_type} are queries over the whole image and lie on no grid of it, so there "
            "is no map to draw; LVLM.attention() has their weights"
        )
    first = np.cumsum(pictures.token_counts) - pictures.token_counts
    return [start + places for start, places in zip(first, maps, strict=True)]


def patch_maps(
    attention: Float[np.ndarray, "*any N"], places: Sequence[Int[np.ndarray, "h w"]]
) -> list[Float[np.ndarray, "*any h w"]]:
    """Weights on the N image tokens of one conversation, as a map over each image.

    Args:
        attention: weights on the image tokens of all images, in order, as from `LVLM.attention`.
        places: the grid of each image, from `token_places`.
    """
    return [attention[..., grid] for grid in places]


def word_maps(maps: Float[np.ndarray, "T *any"], words: list[Word]) -> Float[np.ndarray, "W *any"]:
    """The mean over each word's tokens: W words from T answer tokens.

    The row of a token is the attention row that produced the token, so a word's map shows where the model looked before
    it wrote the word.
    """
    if not words:
        return np.zeros((0, *maps.shape[1:]), maps.dtype)
    return np.stack([maps[list(word.tokens)].mean(0) for word in words])
