"""Functions that contrastive methods share: the contrast of logits, and the exception for samples without an image.

A contrast measures the contribution of the image. For samples without an image, such methods return the main branch's
logits without a plausibility cut.
"""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lvlm_jax.attention import Context, Transform
from lvlm_jax.methods.base import Strength
from lvlm_jax.methods.cuts import Soft, plausible


class ImagePresence(Transform):
    """A transform for the main branch that edits nothing; its carry says which samples have an image, `Bool[Array,
    "B"]`."""

    rows: ClassVar[str] = "last"

    def active(self, layer: int, num_layers: int, phase: str) -> bool:
        return False

    def begin(self, context: Context, embeddings):
        return has_image(context)


def has_image(context: Context) -> Bool[Array, "B"]:
    """Which samples have an image."""
    return context.image_end > 0


def where_image(
    present: Bool[Array, "B"], combined: Float[Array, "B V"], main: Float[Array, "B V"]
) -> Float[Array, "B V"]:
    """`combined` for samples with an image, `main` for the others."""
    return jnp.where(present[:, None], combined, main)


def contrast_logits(
    main: Float[Array, "B V"],
    contrast: Float[Array, "B V"],
    alpha: Float[Array, "#B #V"] | Strength,
    beta: Strength | Soft,
) -> Float[Array, "B V"]:
    """(1 + α) l - α l̃ on plausible tokens, -inf elsewhere."""
    return plausible((1 + alpha) * main - alpha * contrast, main, beta)
