"""LLaVA-NeXT, or LLaVA-1.6 (llava-vl.github.io/blog/2024-01-30-llava-next): LLaVA-1.5 on tiles of any resolution.

Its decoders are Vicuna, Mistral, Llama 3 and Qwen; its tower is CLIP's.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.clip import ClipTower, VisionConfig
from lvlm_jax.models.config import activation_name, decoder_config, special_tokens
from lvlm_jax.models.decoder import Decoder
from lvlm_jax.models.family import FamilyConfig, VisionLanguageModel, family
from lvlm_jax.models.llava import Connector, Llava, feature_layers, feature_select, processor_fields
from lvlm_jax.models.pictures import Arrays, Pictures, square_map
from lvlm_jax.models.tiles import NEWLINE, Tiling, with_newlines


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaNextConfig(FamilyConfig):
    """LLaVA-NeXT: CLIP tower over tiles, two-layer connector, LLaMA-like decoder.

    Attributes:
        tiling: how images are split into tiles.
        feature_layers: indices into the tower's hidden states (0 is the embedding), concatenated over channels.
        feature_select: "default": the class token is dropped, so that the patches of a tile fill a square.
    """

    vision: VisionConfig
    tiling: Tiling
    feature_layers: tuple[int, ...]
    feature_select: str
    projector_act: str
    projector_bias: bool
    model_type: str = "llava_next"
    tiled: ClassVar[bool] = True

    @classmethod
    def from_hf(cls, raw: dict, hf: Any) -> "LlavaNextConfig":
        """Reads a transformers `LlavaNextConfig` object; `raw` is its original dict.

        Raises:
            LVLMError: a part of the configuration is not supported.
        """
        if feature_select(hf) != "default":
            raise LVLMError(
                "vision_feature_select_strategy 'full' is not supported with tiles; expected 'default': a class token "
                "has no place among a tile's patches"
            )
        return cls(vision=VisionConfig.from_hf(hf.vision_config), **shared_fields(raw, hf))

    @property
    def processor_fields(self) -> dict[str, Any]:
        """Settings with which LLaVA-NeXT's processor counts placeholders."""
        return processor_fields(self)

    def pictures(self, parts: Sequence[Arrays], prompts: Sequence[np.ndarray]) -> Pictures | None:
        """The tower's inputs, from a processor's `pixel_values` `[I, tiles, 3, Y, X]` and `image_sizes` `[I, 2]`.

        Raises:
            LVLMError: arrays are missing, have other shapes, or are not finite.
        """
        del prompts
        if (tiles_and_sizes := self.tiling.read(parts)) is None:
            return None
        tiles, index = [], []
        for size in tiles_and_sizes[1]:
            first, (down, across) = sum(tiles), self.tiling.grid(size)
            tiles.append(1 + down * across)
            large = with_newlines(self.tiling.enlarged(first + 1, size), NEWLINE)
            index.append(np.concatenate([self.tiling.overview(first), large]))
        return self.tiling.packed(tiles_and_sizes[0], tiles, index=index)

    def blank(self) -> Pictures:
        """One empty image, in the form of `pictures`."""
        return self.pictures([self.tiling.blank()], [])

    def token_map(self, pictures: Pictures, image: int) -> Int[np.ndarray, "H W"]:
        """For each position of the image, the token that covers it in the first view, which shows the whole image."""
        del pictures, image
        return square_map(self.tiling.side**2)


def shared_fields(raw: dict, hf: Any) -> dict[str, Any]:
    """The fields of a configuration that all tiled models share, without `vision`.

    Raises:
        LVLMError: a part of the configuration is not supported.
    """
    return {
        "text": decoder_config(hf),
        "tiling": Tiling.from_hf(hf),
        "image_token_id": hf.image_token_index,
        "feature_layers": feature_layers(hf, hf.vision_config.num_hidden_layers),
        "feature_select": feature_select(hf),
        "projector_act": activation_name("projector_hidden_act", hf.projector_hidden_act),
        "projector_bias": hf.multimodal_projector_bias,
        "hf": raw,
        **special_tokens(hf),
    }


class TileConnector(Connector):
    """Maps vision features to decoder embeddings, patch by patch; also has the token that ends a row of patches."""

    config: LlavaNextConfig

    def setup(self):
        width = self.config.text.hidden_size
        self.image_newline = self.param("image_newline", nn.initializers.normal(width**-0.5), (width,))


@family("llava_next")
class LlavaNext(Llava):
    """LLaVA-NeXT."""

    config: LlavaNextConfig

    def setup(self):
        self.vision_tower = ClipTower(self.config.vision, self.dtype)
        self.connector = TileConnector(self.config, self.dtype)
        self.language_model = Decoder(self.config.text, self.dtype, self.remat)

    # Tokens are gathered from a table, or mixed from several rows.
    salience = VisionLanguageModel.salience

    def encode_images(
        self, pixels: Float[Array, "R 3 Y X"], index: Int[Array, "N *K"], weights: Float[Array, "N K"] | None = None
    ) -> Float[Array, "N E"]:
        """Image tokens of all images, in order, from R tiles.

        Args:
            pixels: the tiles.
            index: the row of each token in the table that `models.tiles` describes; several rows to mix if there are
                `weights`.
            weights: the weight of each row in a token.
        """
        patches = self._by_pictures(lambda model, part: model.connector(model.image_features(part)), pixels)
        newline = self.connector.image_newline.astype(patches.dtype)
        rows = jnp.concatenate([newline[None], patches.reshape(-1, patches.shape[-1])])
        if weights is None:
            return rows[index]
        # Row by row: all K at once would take K times the memory.
        mixed = sum(weights[:, k, None] * rows[index[:, k]] for k in range(index.shape[1]))
        return mixed.astype(rows.dtype)
