"""Gemma 3 (arXiv 2503.19786): SigLIP tower, averaged patches with one projection, Gemma decoder.

Every run of placeholders in the prompt is one image. With pan and scan, the processor cuts crops from long images and
gives each its own run; these count as further images, unless `num_crops` assigns them to their image.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.config import decoder_config, special_tokens
from lvlm_jax.models.decoder import Decoder
from lvlm_jax.models.family import FamilyConfig, VisionLanguageModel, family
from lvlm_jax.models.layers import linear, rms_norm
from lvlm_jax.models.pictures import Arrays, Pictures, named_arrays, square_map, square_pixels, whole_pictures
from lvlm_jax.models.siglip import SiglipConfig, SiglipTower
from lvlm_jax.models.vision import by_pictures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(FamilyConfig):
    """Gemma 3: SigLIP tower, averaging connector, Gemma decoder.

    Attributes:
        pool: side, in patches, of the square that is averaged to one image token.
    """

    vision: SiglipConfig
    pool: int
    model_type: str = "gemma3"

    @property
    def tokens_per_image(self) -> int:
        """How many tokens every image takes; a crop of pan and scan counts as an image."""
        return (self.vision.side // self.pool) ** 2

    @classmethod
    def from_hf(cls, raw: dict, hf: Any) -> "Gemma3Config":
        """Reads a transformers `Gemma3Config` object; `raw` is its original dict.

        Raises:
            LVLMError: a part of the configuration is not supported.
        """
        _check_text(hf.text_config)
        vision = SiglipConfig.from_hf(hf.vision_config)
        tokens = hf.mm_tokens_per_image
        pool = vision.side // max(1, int(tokens**0.5))
        if pool == 0 or (vision.side // pool) ** 2 != tokens:
            raise LVLMError(
                f"mm_tokens_per_image {tokens} does not fit a grid of {vision.side} x {vision.side} patches; expected "
                f"the square of {vision.side} // n for a whole number n"
            )
        return cls(
            text=decoder_config(hf),
            vision=vision,
            image_token_id=hf.image_token_index,
            pool=pool,
            hf=raw,
            **special_tokens(hf),
        )

    def pictures(self, parts: Sequence[Arrays], prompts: Sequence[np.ndarray]) -> Pictures | None:
        """The tower's inputs, from a processor's `pixel_values` `[R, 3, Y, X]`; None without images.

        `num_crops` `[I]`, if given, says how many of the rows after each image are its crops.

        Raises:
            LVLMError: pixels have another shape or are not finite, or `num_crops` does not match them.
        """
        del prompts
        pixels = square_pixels(parts, self.vision.image_size)
        if pixels is None:
            return None
        if not named_arrays(parts, "num_crops"):
            return whole_pictures(pixels, self.tokens_per_image)
        rows = np.concatenate([_rows_per_image(part) for part in parts if part.get("pixel_values") is not None])
        owner = np.repeat(np.arange(len(rows)), rows)
        return Pictures(pixels, owner, rows * self.tokens_per_image)

    def blank(self) -> Pictures:
        """One empty image, in the form of `pictures`."""
        side = self.vision.image_size
        return whole_pictures(np.zeros((1, 3, side, side), np.float32), self.tokens_per_image)

    def token_map(self, pictures: Pictures, image: int) -> Int[np.ndarray, "H W"]:
        """For each position of the image, the token that covers it in the view of the whole image."""
        del pictures, image
        return square_map(self.tokens_per_image)


def _check_text(text: Any) -> None:
    """Raises an `LVLMError` for options that configurations may have but no Gemma 3 checkpoint uses."""
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        if getattr(text, name) is not None:
            raise LVLMError(f"text_config.{name} {getattr(text, name)} is not supported; expected null")
    if text.use_bidirectional_attention:
        raise LVLMError("text_config.use_bidirectional_attention true is not supported; expected false")
    if "sliding_attention" in text.layer_types and not text.sliding_window:
        raise LVLMError(
            f"text_config.sliding_window is {text.sliding_window} and layer_types names sliding_attention; "
            "expected a width in tokens"
        )


def _rows_per_image(part: Arrays) -> np.ndarray:
    """How many rows of a processor's pixels each image takes: itself and its crops."""
    count, crops = len(part["pixel_values"]), part.get("num_crops")
    if crops is None:
        return np.ones(count, np.int64)
    crops = np.asarray(crops, np.int64).reshape(-1)
    if (crops < 0).any() or (1 + crops).sum() != count:
        raise LVLMError(
            f"num_crops {crops.tolist()} stands for {(1 + crops).sum()} rows of pixel_values, which has {count}; "
            "expected one number for each image, whose crops follow it"
        )
    return 1 + crops


class Connector(nn.Module):
    """Vision features to decoder embeddings: squares of patches averaged, normalised, projected."""

    config: Gemma3Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features: Float[Array, "I P W"]) -> Float[Array, "I Q E"]:
        vision, pool = self.config.vision, self.config.pool
        images, _, width = features.shape
        squares = vision.side // pool
        grid = features.reshape(images, vision.side, vision.side, width)
        grid = grid[:, : squares * pool, : squares * pool]  # incomplete squares at the border are left out
        pooled = grid.reshape(images, squares, pool, squares, pool, width).mean(axis=(2, 4))
        normed = rms_norm(vision.layer_norm_eps, self.dtype, "norm", offset=True)(pooled)
        projected = linear(self.config.text.hidden_size, self.dtype, "projection")(normed)
        return projected.reshape(images, squares**2, -1)


@family("gemma3")
class Gemma3(VisionLanguageModel):
    """Gemma 3."""

    config: Gemma3Config

    def setup(self):
        self.vision_tower = SiglipTower(self.config.vision, self.dtype)
        self.connector = Connector(self.config, self.dtype)
        self.language_model = Decoder(self.config.text, self.dtype, self.remat)

    def encode_images(self, pixels: Float[Array, "I 3 Y X"]) -> Float[Array, "I Q E"]:
        """Image tokens of I images, for the decoder."""

        def look(model: Gemma3, pixels: Float[Array, "I 3 Y X"]) -> Float[Array, "I Q E"]:
            _, features = model.vision_tower(pixels.astype(model.dtype))
            return model.connector(features)

        return by_pictures(self, look, pixels, self.config.vision.num_patches)
