"""GLM-4.1V (arXiv 2507.01006): a tower for images of any size, a gated connector, a decoder with norms on both sides.

The tower has gated MLPs, root-mean-square norms, rotary positions in attention, and a learned grid of positions that is
resampled to each image by cubic convolution.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.attention.rotary import Rotation
from lvlm_jax.errors import LVLMError
from lvlm_jax.models.config import decoder_config, special_tokens
from lvlm_jax.models.decoder import Decoder
from lvlm_jax.models.family import VisionLanguageModel, family
from lvlm_jax.models.interpolation import ResampledPositions, center_aligned, cubic_taps, with_positions
from lvlm_jax.models.layers import activation, layer_norm, linear, rms_norm
from lvlm_jax.models.loose_patches import LoosePatchConfig, PatchTowerConfig, check_width, tower_sizes
from lvlm_jax.models.pictures import Pictures
from lvlm_jax.models.qwen_vision import (
    Attention,
    GatedMlp,
    PatchAttention,
    PatchEmbedding,
    apply_in_chunks,
    axial_rotation,
    in_reading_order,
    tokens_by_pictures,
)
from lvlm_jax.models.vision import picture_attention

# The fields of a flat `config.json` that do not belong to the decoder, besides the tokens of images and videos.
_TOP_FIELDS = (
    "architectures",
    "model_type",
    "vision_config",
    "auto_map",
    "tie_word_embeddings",
    "torch_dtype",
    "dtype",
)
CONNECTOR_EPSILON = 1e-5  # in no configuration


@dataclasses.dataclass(frozen=True, kw_only=True)
class Glm4vConfig(LoosePatchConfig):
    """GLM-4.1V. A video is recognised by its first token, because its frames use the token of images.

    Attributes:
        side: entries along each axis of the tower's table of positions.
        connector_width: width between the gate and the down projection of the connector.
        attention_bias: whether queries, keys and values of the tower have a bias.
        rms_norm_eps: epsilon of the tower's norms.
    """

    side: int
    connector_width: int
    attention_bias: bool
    rms_norm_eps: float
    model_type: str = "glm4v"

    @classmethod
    def nested(cls, raw: dict) -> dict:
        """Nests the published `config.json`, which is flat: the decoder's fields are beside `vision_config`."""
        if "text_config" in raw or "hidden_size" not in raw:
            return raw
        top = {
            name: value for name, value in raw.items() if name in _TOP_FIELDS or name.startswith(("image_", "video_"))
        }
        text = {name: value for name, value in raw.items() if name not in top}
        return top | {"text_config": text | {"model_type": "glm4v_text"}}

    @classmethod
    def from_hf(cls, raw: dict, hf: Any) -> "Glm4vConfig":
        """Reads a transformers `Glm4vConfig` object; `raw` is its original dict.

        Raises:
            LVLMError: a part of the configuration is not supported.
        """
        if "text_config" not in raw:
            raise LVLMError(
                "config.json has no text_config; expected one beside vision_config; use the file of the model's "
                "current repository"
            )
        vision, text = hf.vision_config, decoder_config(hf)
        check_width(vision, text)
        if not isinstance(vision.image_size, int):
            raise LVLMError(f"vision_config.image_size {vision.image_size} is not supported; expected one number")
        # The tower's MLPs are as wide as the decoder; `intermediate_size` belongs to the connector.
        sizes = tower_sizes(vision, vision.hidden_size, vision.out_hidden_size)
        return cls(
            text=text,
            vision=PatchTowerConfig(**sizes),
            side=vision.image_size // vision.patch_size,
            connector_width=vision.intermediate_size,
            attention_bias=vision.attention_bias,
            rms_norm_eps=vision.rms_norm_eps,
            image_token_id=hf.image_token_id,
            video_token_id=hf.video_start_token_id,
            hf=raw,
            **special_tokens(hf),
        )

    def with_geometry(self, pictures: Pictures) -> Pictures:
        """`pictures` with each patch's place in the tower's table of positions."""
        return with_positions(pictures, self.vision.merge, self.side, center_aligned, cubic_taps)


class TowerLayer(nn.Module):
    """Attention and gated MLP, each after its norm and added to the residual stream."""

    config: Glm4vConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "R P W"], rotation: Rotation, attention: Attention) -> Float[Array, "R P W"]:
        config, vision = self.config, self.config.vision
        normed = rms_norm(config.rms_norm_eps, self.dtype, "norm1")(x)
        x = x + PatchAttention(vision, self.dtype, use_bias=config.attention_bias, output_bias=False, name="self_attn")(
            normed, rotation, attention
        )
        normed = rms_norm(config.rms_norm_eps, self.dtype, "norm2")(x)
        return x + apply_in_chunks(GatedMlp(vision, self.dtype, use_bias=False, name="mlp"), normed)


class Tower(nn.Module):
    """Maps patches to normalised features."""

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
        attention = functools.partial(picture_attention, valid=valid)
        for index in range(vision.num_layers):
            x = TowerLayer(config, self.dtype, name=f"layers_{index}")(x, rotation, attention)
        return rms_norm(config.rms_norm_eps, self.dtype, "output_norm")(x)


class Connector(nn.Module):
    """A convolution that merges the patches of a token, then a projection and a gated MLP."""

    config: Glm4vConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features: Float[Array, "R P W"]) -> Float[Array, "R M E"]:
        width, side = self.config.text.hidden_size, self.config.vision.merge
        act = activation(self.config.vision.hidden_act)

        def project(size: int, name: str) -> nn.Module:
            return linear(size, self.dtype, name)

        # The patches of a token are consecutive, row by row.
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
        return project(width, "down_proj")(act(project(inner, "gate_proj")(hidden)) * project(inner, "up_proj")(hidden))


@family("glm4v")
class Glm4v(VisionLanguageModel):
    """GLM-4.1V."""

    config: Glm4vConfig

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
        return in_reading_order(tokens_by_pictures(self, pixels, coordinates, valid, entries, weights), order)
