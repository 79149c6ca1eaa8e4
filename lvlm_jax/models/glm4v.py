"""GLM-4.1V (arXiv 2507.01006): a tower for pictures of any size, a gated connector, a decoder with norms on both sides.

Gates, root-mean-square norms and positions of the tower: rotary ones in attention, and a learned grid that is resampled
to each picture by cubic convolution.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.attention.rotary import Rotation
from lvlm_jax.errors import LVLMError
from lvlm_jax.models.config import DecoderConfig, decoder_config, special_tokens
from lvlm_jax.models.decoder import Decoder
from lvlm_jax.models.family import VisionLanguageModel
from lvlm_jax.models.interpolation import ResampledPositions, center_aligned, cubic_taps, with_positions
from lvlm_jax.models.layers import activation, layer_norm, linear, rms_norm
from lvlm_jax.models.pictures import Arrays, Pictures, grid_map
from lvlm_jax.models.qwen_vision import (
    GatedMlp,
    PatchAttention,
    PatchEmbedding,
    PatchTowerConfig,
    axial_rotation,
    blank_patches,
    in_reading_order,
    patch_rows,
    patches_of,
    picture_groups,
    refuse_videos,
    tower_sizes,
)

CONNECTOR_EPSILON = 1e-5  # no configuration tells


@dataclasses.dataclass(frozen=True)
class Glm4vConfig:
    """GLM-4.1V.

    Attributes:
        side: entries along each axis of the tower's table of positions.
        connector_width: between gate and down projection of the connector.
        attention_bias: of queries, keys and values of the tower.
        rms_norm_eps: of the tower's norms.
        video_start_token_id: what a video begins with; its frames share the token of images.
        eos_token_ids: tokens that end an answer.
        bos_token_id: what a prompt begins with; -1 for none.
        hf: the Hugging Face configuration as read, for writing it back; takes no part in equality.
    """

    text: DecoderConfig
    vision: PatchTowerConfig
    side: int
    connector_width: int
    attention_bias: bool
    rms_norm_eps: float
    image_token_id: int
    video_start_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    bos_token_id: int = -1
    model_type: str = "glm4v"
    hf: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_hf(cls, raw: dict, hf: Any) -> "Glm4vConfig":
        """Reads a transformers `Glm4vConfig` object; `raw` is the dict it came from.

        Raises:
            LVLMError: a part of the configuration is not supported.
        """
        if "text_config" not in raw:
            raise LVLMError(
                "config.json has no text_config; expected one beside vision_config, take the file from the model's "
                "current repository"
            )
        vision, text = hf.vision_config, decoder_config(hf)
        if vision.out_hidden_size != text.hidden_size:
            raise LVLMError(
                f"vision_config.out_hidden_size is {vision.out_hidden_size}; expected the decoder's hidden_size "
                f"{text.hidden_size}"
            )
        if not isinstance(vision.image_size, int):
            raise LVLMError(
                f"vision_config.image_size {vision.image_size} is not supported; expected one number"
            )
        # The tower's layers are as wide inside as the decoder; `intermediate_size` is the connector's.
        sizes = tower_sizes(vision, vision.hidden_size, vision.out_hidden_size)
        return cls(
            text=text,
            vision=PatchTowerConfig(**sizes),
            side=vision.image_size // vision.patch_size,
            connector_width=vision.intermediate_size,
            attention_bias=vision.attention_bias,
            rms_norm_eps=vision.rms_norm_eps,
            image_token_id=hf.image_token_id,
            video_start_token_id=hf.video_start_token_id,
            hf=raw,
            **special_tokens(hf),
        )

    def pictures(self, parts: Sequence[Arrays], prompts: Sequence[np.ndarray]) -> Pictures | None:
        """What the tower takes, from a processor's `pixel_values` and `image_grid_thw`; None without images.

        Raises:
            LVLMError: videos, or patches and grids that do not fit together.
        """
        refuse_videos(parts, prompts, self.video_start_token_id)
        return self._placed(patch_rows(parts, self.vision.channels, self.vision.merge))

    def blank(self) -> Pictures:
        """One empty image, as `pictures` would give it."""
        return self._placed(blank_patches(self.vision.channels, self.vision.merge))

    def token_map(self, pictures: Pictures, image: int) -> Int[np.ndarray, "H W"]:
        """Which of an image's tokens shows each place of it."""
        return grid_map(pictures, image)

    def shown(
        self, pictures: Pictures, picture: Callable[[int, int], np.ndarray]
    ) -> Float[np.ndarray, "R P C"]:
        """The pixels if all images were one picture, which is asked for at a height and a width."""
        return patches_of(picture, self.vision, pictures.geometry)

    def _placed(self, pictures: Pictures | None) -> Pictures | None:
        if pictures is None:
            return None
        return with_positions(pictures, self.vision.merge, self.side, center_aligned, cubic_taps)


class TowerLayer(nn.Module):
    """Attention and gated MLP, each behind its norm and added to the stream."""

    config: Glm4vConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "R P W"], rotation: Rotation, groups: Int[Array, "R P"]
    ) -> Float[Array, "R P W"]:
        config, vision = self.config, self.config.vision
        attention = PatchAttention(
            vision, self.dtype, use_bias=config.attention_bias, output_bias=False, name="self_attn"
        )
        x = x + attention(rms_norm(config.rms_norm_eps, self.dtype, "norm1")(x), rotation, groups)
        normed = rms_norm(config.rms_norm_eps, self.dtype, "norm2")(x)
        return x + GatedMlp(vision, self.dtype, use_bias=False, name="mlp")(normed)


class Tower(nn.Module):
    """Patches to normalised features."""

    config: Glm4vConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        pixels: Float[Array, "R P C"],
        coordinates: Int[Array, "R P 2"],
        valid: Bool[Array, "R P"],
        entries: Int[Array, "R P 16"],
        weights: Float[Array, "R P 16"],
    ) -> Float[Array, "R P W"]:
        config, vision = self.config, self.config.vision
        x = PatchEmbedding(vision, self.dtype, use_bias=True, name="patch_embedding")(pixels)
        x = rms_norm(config.rms_norm_eps, self.dtype, "embedding_norm")(x)
        table = ResampledPositions(config.side**2, vision.hidden_size, name="position_embedding")
        x = x + table(entries, weights).astype(self.dtype)
        rotation = axial_rotation(coordinates, vision.head_dim, vision.rope_theta)
        for index in range(vision.num_layers):
            x = TowerLayer(config, self.dtype, name=f"layers_{index}")(x, rotation, picture_groups(valid))
        return rms_norm(config.rms_norm_eps, self.dtype, "output_norm")(x)


class Connector(nn.Module):
    """Patches of a token brought together by a convolution, then a projection and a gated MLP."""

    config: Glm4vConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features: Float[Array, "R P W"]) -> Float[Array, "R M E"]:
        width, side = self.config.text.hidden_size, self.config.vision.merge
        act = activation(self.config.vision.hidden_act)

        def project(size: int, name: str) -> nn.Module:
            return linear(size, self.dtype, name)

        # The patches of a token lie one behind the other, row by row.
        blocks = features.reshape(-1, side, side, features.shape[-1])
        merged = nn.Conv(
            width,
            kernel_size=(side, side),
            strides=side,
            padding="VALID",
            dtype=self.dtype,
            precision=jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None,
            name="downsample",
        )(blocks).reshape(features.shape[0], -1, width)
        normed = layer_norm(CONNECTOR_EPSILON, self.dtype, "norm")(project(width, "proj")(merged))
        hidden = activation("gelu")(normed)
        inner = self.config.connector_width
        return project(width, "down_proj")(
            act(project(inner, "gate_proj")(hidden)) * project(inner, "up_proj")(hidden)
        )


class Glm4v(VisionLanguageModel):
    """GLM-4.1V."""

    config: Glm4vConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self):
        self.vision_tower = Tower(self.config, self.dtype)
        self.connector = Connector(self.config, self.dtype)
        self.language_model = Decoder(self.config.text, self.dtype, self.remat)

    def encode_images(
        self,
        pixels: Float[Array, "R P C"],
        coordinates: Int[Array, "R P 2"],
        valid: Bool[Array, "R P"],
        order: Int[Array, "N 2"],
        entries: Int[Array, "R P 16"],
        weights: Float[Array, "R P 16"],
    ) -> Float[Array, "N E"]:
        """Image tokens in reading order, then filler; the geometry is that of `patch_rows` and `with_positions`."""
        return in_reading_order(
            self.connector(self.vision_tower(pixels, coordinates, valid, entries, weights)), order
        )
