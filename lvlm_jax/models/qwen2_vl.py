"""Qwen2-VL (arXiv 2409.12191): a tower over patches of any picture size, multimodal positions in a Qwen2 decoder."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.attention.rotary import Rotation
from lvlm_jax.models.config import DecoderConfig, decoder_config, special_tokens
from lvlm_jax.models.decoder import Decoder
from lvlm_jax.models.family import VisionLanguageModel
from lvlm_jax.models.layers import layer_norm
from lvlm_jax.models.pictures import Arrays, Pictures, grid_map
from lvlm_jax.models.qwen_vision import (
    PatchAttention,
    PatchEmbedding,
    PatchMerger,
    PatchTowerConfig,
    PlainMlp,
    axial_rotation,
    blank_patches,
    in_reading_order,
    patch_rows,
    patches_of,
    picture_groups,
    refuse_videos,
    tower_sizes,
)

EPSILON = 1e-6  # of all norms of the tower


@dataclasses.dataclass(frozen=True)
class Qwen2VlConfig:
    """Qwen2-VL.

    Attributes:
        eos_token_ids: tokens that end an answer.
        bos_token_id: what a prompt begins with; -1 for none.
        hf: the Hugging Face configuration as read, for writing it back; takes no part in equality.
    """

    text: DecoderConfig
    vision: PatchTowerConfig
    image_token_id: int
    video_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    bos_token_id: int = -1
    model_type: str = "qwen2_vl"
    hf: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_hf(cls, raw: dict, hf: Any) -> "Qwen2VlConfig":
        """Reads a transformers `Qwen2VLConfig` object; `raw` is the dict it came from.

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
        """Reads a transformers `Qwen2VLVisionConfig`, whose `hidden_size` is that of the decoder.

        Raises:
            LVLMError: a value that is not supported.
        """
        return PatchTowerConfig(
            **tower_sizes(vision, vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio))
        )

    def pictures(self, parts: Sequence[Arrays], prompts: Sequence[np.ndarray]) -> Pictures | None:
        """What the tower takes, from a processor's `pixel_values` and `image_grid_thw`; None without images.

        Raises:
            LVLMError: videos, or patches and grids that do not fit together.
        """
        refuse_videos(parts, prompts, self.video_token_id)
        return patch_rows(parts, self.vision.channels, self.vision.merge)

    def blank(self) -> Pictures:
        """The smallest image, as `pictures` would give it."""
        return blank_patches(self.vision.channels, self.vision.merge)

    def token_map(self, pictures: Pictures, image: int) -> Int[np.ndarray, "H W"]:
        """Which of an image's tokens shows each place of it."""
        return grid_map(pictures, image)

    def shown(
        self, pictures: Pictures, picture: Callable[[int, int], np.ndarray]
    ) -> Float[np.ndarray, "R P C"]:
        """The pixels if all images were one picture, which is asked for at a height and a width."""
        return patches_of(picture, self.vision, pictures.geometry)


class TowerLayer(nn.Module):
    """Attention and MLP, each behind its norm and added to the stream."""

    config: PatchTowerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "R P W"], rotation: Rotation, groups: Int[Array, "R P"]
    ) -> Float[Array, "R P W"]:
        normed = layer_norm(EPSILON, self.dtype, "norm1")(x)
        x = x + PatchAttention(self.config, self.dtype, name="self_attn")(normed, rotation, groups)
        normed = layer_norm(EPSILON, self.dtype, "norm2")(x)
        return x + PlainMlp(self.config, self.dtype, name="mlp")(normed)


class Tower(nn.Module):
    """Patches to features."""

    config: PatchTowerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, patches: Float[Array, "R P C"], coordinates: Int[Array, "R P 2"], valid: Bool[Array, "R P"]
    ) -> Float[Array, "R P W"]:
        config = self.config
        x = PatchEmbedding(config, self.dtype, name="patch_embedding")(patches)
        rotation = axial_rotation(coordinates, config.head_dim, config.rope_theta)
        groups = picture_groups(valid)
        for index in range(config.num_layers):
            x = TowerLayer(config, self.dtype, name=f"layers_{index}")(x, rotation, groups)
        return x


class Qwen2Vl(VisionLanguageModel):
    """Qwen2-VL."""

    config: Qwen2VlConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self):
        config = self.config
        self.vision_tower = Tower(config.vision, self.dtype)
        self.connector = PatchMerger(
            config.text.hidden_size, config.vision.merge**2, self.dtype, epsilon=EPSILON
        )
        self.language_model = Decoder(config.text, self.dtype, self.remat)

    def encode_images(
        self,
        pixels: Float[Array, "R P C"],
        coordinates: Int[Array, "R P 2"],
        valid: Bool[Array, "R P"],
        order: Int[Array, "N 2"],
    ) -> Float[Array, "N E"]:
        """Image tokens as the decoder receives them, filler behind; arguments as `patch_rows` makes them."""
        features = self.vision_tower(pixels, coordinates, valid)
        return in_reading_order(self.connector(features), order)
