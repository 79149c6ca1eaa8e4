"""Qwen2-VL (arXiv 2409.12191): a tower for images of any size, multimodal positions in a Qwen2 decoder."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.attention.rotary import Rotation
from lvlm_jax.models.config import decoder_config, special_tokens
from lvlm_jax.models.decoder import Decoder
from lvlm_jax.models.family import VisionLanguageModel, family
from lvlm_jax.models.layers import layer_norm
from lvlm_jax.models.loose_patches import LoosePatchConfig, PatchTowerConfig, tower_sizes
from lvlm_jax.models.qwen_vision import (
    Attention,
    PatchAttention,
    PatchEmbedding,
    PatchMerger,
    PlainMlp,
    apply_in_chunks,
    axial_rotation,
    in_reading_order,
    tokens_by_pictures,
)
from lvlm_jax.models.vision import picture_attention

EPSILON = 1e-6  # epsilon of all norms of the tower


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2VlConfig(LoosePatchConfig):
    """Qwen2-VL."""

    model_type: str = "qwen2_vl"

    @classmethod
    def from_hf(cls, raw: dict, hf: Any) -> "Qwen2VlConfig":
        """Reads a transformers `Qwen2VLConfig` object; `raw` is its original dict.

        Raises:
            LVLMError: a part of the configuration is not supported.
        """
        return cls(
            text=decoder_config(hf),
            vision=cls.tower_from_hf(hf.vision_config),
            image_token_id=hf.image_token_id,
            video_token_id=hf.video_token_id,
            hf=raw,
            **special_tokens(hf),
        )

    @staticmethod
    def tower_from_hf(vision: Any) -> PatchTowerConfig:
        """Reads a transformers `Qwen2VLVisionConfig`; its `hidden_size` is the decoder's.

        Raises:
            LVLMError: a value that is not supported.
        """
        return PatchTowerConfig(**tower_sizes(vision, vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio)))


class TowerLayer(nn.Module):
    """Attention and MLP, each after its norm and added to the residual stream."""

    config: PatchTowerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "R P W"], rotation: Rotation, attention: Attention) -> Float[Array, "R P W"]:
        normed = layer_norm(EPSILON, self.dtype, "norm1")(x)
        x = x + PatchAttention(self.config, self.dtype, name="self_attn")(normed, rotation, attention)
        normed = layer_norm(EPSILON, self.dtype, "norm2")(x)
        return x + apply_in_chunks(PlainMlp(self.config, self.dtype, name="mlp"), normed)


class Tower(nn.Module):
    """Maps patches to features."""

    config: PatchTowerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, patches: Float[Array, "R P C"], coordinates: Int[Array, "R P 2"], valid: Bool[Array, "R P"]
    ) -> Float[Array, "R P W"]:
        config = self.config
        x = PatchEmbedding(config, self.dtype, name="patch_embedding")(patches)
        rotation = axial_rotation(coordinates, config.head_dim, config.rope_theta)
        attention = functools.partial(picture_attention, valid=valid)
        for index in range(config.num_layers):
            x = TowerLayer(config, self.dtype, name=f"layers_{index}")(x, rotation, attention)
        return x


@family("qwen2_vl")
class Qwen2Vl(VisionLanguageModel):
    """Qwen2-VL."""

    config: Qwen2VlConfig

    def setup(self):
        config = self.config
        self.vision_tower = Tower(config.vision, self.dtype)
        self.connector = PatchMerger(config.text.hidden_size, config.vision.merge**2, self.dtype, epsilon=EPSILON)
        self.language_model = Decoder(config.text, self.dtype, self.remat)

    def encode_images(
        self,
        pixels: Float[Array, "R P C"],
        coordinates: Int[Array, "R P 2"],
        valid: Bool[Array, "R P"],
        order: Int[Array, "N 2"],
    ) -> Float[Array, "N E"]:
        """Image tokens for the decoder, then filler; arguments as from `patch_rows`."""
        return in_reading_order(tokens_by_pictures(self, pixels, coordinates, valid), order)
