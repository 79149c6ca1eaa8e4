"""LLaVA-OneVision (arXiv 2408.03326): LLaVA-NeXT with a SigLIP tower, a Qwen2 decoder and many more tiles.

A single image is tiled; if its large view takes too many tokens, the feature map of that view is shrunk. If a
prompt has several images, each is one tile that shows the whole image.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.decoder import Decoder
from lvlm_jax.models.family import family
from lvlm_jax.models.llava import feature_select
from lvlm_jax.models.llava_next import LlavaNext, LlavaNextConfig, TileConnector, shared_fields
from lvlm_jax.models.pictures import Arrays, Pictures, concatenate
from lvlm_jax.models.siglip import SiglipConfig, SiglipTower
from lvlm_jax.models.tiles import NEWLINE, bilinear, with_newlines

UNTOUCHED = 1.1  # a map that exceeds its bound by at most this factor along each side is not shrunk
ONE_ROW = np.array([1, 0, 0, 0], np.float32)  # the weights of a token that is not mixed


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaOnevisionConfig(LlavaNextConfig):
    """LLaVA-OneVision: SigLIP tower over tiles, two-layer connector, Qwen2 decoder.

    Attributes:
        feature_select: "full": the tower has no class token to drop.
        most_tiles: the enlarged view of an image has at most as many tokens as this number of tiles has patches.
    """

    vision: SiglipConfig
    most_tiles: int = 9
    model_type: str = "llava_onevision"
    nested_images: ClassVar[bool] = True

    @classmethod
    def from_hf(cls, raw: dict, hf: Any) -> "LlavaOnevisionConfig":
        """Reads a transformers `LlavaOnevisionConfig` object; `raw` is its original dict.

        Raises:
            LVLMError: a part of the configuration is not supported.
        """
        if feature_select(hf) != "full":
            raise LVLMError(
                "vision_feature_select_strategy 'default' is not supported with a SigLIP tower, which has no "
                "class token to drop; expected 'full'"
            )
        bound = re.fullmatch(r"anyres_max_([1-9]\d*)", hf.vision_aspect_ratio)
        if bound is None:
            raise LVLMError(
                f"vision_aspect_ratio {hf.vision_aspect_ratio!r} is not supported; expected 'anyres_max_' and a number "
                "of tiles, as 'anyres_max_9'"
            )
        vision = SiglipConfig.from_hf(hf.vision_config)
        return cls(vision=vision, most_tiles=int(bound[1]), **shared_fields(raw, hf))

    @property
    def processor_fields(self) -> dict[str, Any]:
        """Settings with which LLaVA-OneVision's processor counts placeholders."""
        return {
            "num_image_tokens": self.vision.num_patches,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": f"anyres_max_{self.most_tiles}",
        }

    def pictures(self, parts: Sequence[Arrays], prompts: Sequence[np.ndarray]) -> Pictures | None:
        """The tower's inputs, from a processor's arrays.

        These are `pixel_values` `[I, tiles, 3, Y, X]`, `image_sizes` `[I, 2]` and `batch_num_images`, the number of
        images of each prompt that has any. Without the latter, each image counts as single.

        Raises:
            LVLMError: arrays are missing, have other shapes, or are not finite; or there are videos.
        """
        del prompts
        if any(part.get("pixel_values_videos") is not None for part in parts):
            raise LVLMError("pixel_values_videos is not supported: videos cannot be read, give frames as images")
        if (tiles_and_sizes := self.tiling.read(parts)) is None:
            return None
        pixels, sizes = tiles_and_sizes
        tiles, index, weights = [], [], []
        for size, alone in zip(sizes, _is_single(parts, len(sizes)), strict=True):
            first, (down, across) = sum(tiles), self.tiling.grid(size) if alone else (0, 0)
            tiles.append(1 + down * across)
            overview = _single_rows(self.tiling.overview(first))
            if alone:
                rows, shares = self._bounded(self.tiling.enlarged(first + 1, size))
                large = with_newlines(rows, NEWLINE), with_newlines(shares, ONE_ROW)
            else:
                large = _single_rows(np.array([NEWLINE]))
            index.append(np.concatenate([overview[0], large[0]]))
            weights.append(np.concatenate([overview[1], large[1]]))
        return self.tiling.packed(pixels, tiles, index=index, weights=weights)

    def _bounded(self, patches: Int[np.ndarray, "H W"]) -> tuple[Int[np.ndarray, "Y X 4"], Float[np.ndarray, "Y X 4"]]:
        """A map of patches, shrunk if it takes too many tokens: the rows that each token mixes, and their weights."""
        height, width = patches.shape
        ratio = math.sqrt(height * width / (self.most_tiles * self.tiling.side**2))
        if ratio <= UNTOUCHED:
            return _single_rows(patches)
        return bilinear(patches, int(height // ratio), int(width // ratio))


def _single_rows(rows: Int[np.ndarray, "*N"]) -> tuple[Int[np.ndarray, "*N 4"], Float[np.ndarray, "*N 4"]]:
    """Tokens of one row each, in the form of mixed tokens."""
    return np.repeat(rows[..., None], 4, axis=-1), np.broadcast_to(ONE_ROW, (*rows.shape, 4))


def _is_single(parts: Sequence[Arrays], images: int) -> np.ndarray:
    """For each image, whether its prompt has no other image."""
    together = concatenate(parts, "batch_num_images")
    if together is None:
        return np.ones(images, bool)
    if together.ndim != 1 or together.dtype.kind not in "iu" or (together < 0).any() or together.sum() != images:
        raise LVLMError(
            f"batch_num_images is {together.tolist()}; expected the number of images of each prompt, {images} in all"
        )
    return np.repeat(together == 1, together)


@family("llava_onevision")
class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision."""

    config: LlavaOnevisionConfig

    def setup(self):
        self.vision_tower = SiglipTower(self.config.vision, self.dtype)
        self.connector = TileConnector(self.config, self.dtype)
        self.language_model = Decoder(self.config.text, self.dtype, self.remat)

    def image_features(self, pixels: Float[Array, "R 3 Y X"]) -> Float[Array, "R P W"]:
        """The chosen hidden states of the tower, concatenated over channels."""
        states, _ = self.vision_tower(pixels.astype(self.dtype))
        return jnp.concatenate([states[layer] for layer in self.config.feature_layers], axis=-1)
