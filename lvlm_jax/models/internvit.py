"""InternViT, the vision tower of InternVL (arXiv 2312.14238, 2412.05271), up to its hidden states."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.config import activation_name, refuse_cut_heads
from lvlm_jax.models.layers import activation, layer_norm, linear, rms_norm
from lvlm_jax.models.vision import patch_convolution, picture_attention

NORMS = {"layer_norm": layer_norm, "rms_norm": rms_norm}
QK_NORM_EPS = 1e-6  # independent of `layer_norm_eps`


@dataclasses.dataclass(frozen=True)
class InternVitConfig:
    """An InternViT.

    Attributes:
        image_size, patch_size: sides of a tile and of a patch in pixels; both are square.
        norm: kind of the norms before attention and MLP, one of `NORMS`.
        attention_bias: whether queries, keys and values have a bias.
        qk_norm: queries and keys are root-mean-square normalised over all heads together.
        positions: position embeddings are added.
        mask_token: the checkpoint contains the token that replaced hidden patches in training.
        final_norm: the last hidden state is layer-normalised.
        layer_scale: initial value of the channel-wise factors on attention and MLP.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    norm: str
    layer_norm_eps: float
    attention_bias: bool
    qk_norm: bool
    positions: bool
    mask_token: bool
    final_norm: bool
    layer_scale: float

    @property
    def side(self) -> int:
        """Patches along a tile's side."""
        return self.image_size // self.patch_size

    @classmethod
    def from_hf(cls, vision: Any) -> "InternVitConfig":
        """Reads a transformers `InternVLVisionConfig`.

        Raises:
            LVLMError: unsupported `model_type`, norm, activation or number of heads, or tiles that are not square.
        """
        if vision.model_type != "internvl_vision":
            raise LVLMError(
                f"vision_config.model_type {vision.model_type!r} is not supported; expected 'internvl_vision'"
            )
        if vision.num_channels != 3:
            raise LVLMError(f"vision_config.num_channels {vision.num_channels} is not supported; expected 3")
        if vision.norm_type not in NORMS:
            raise LVLMError(
                f"vision_config.norm_type {vision.norm_type!r} is not supported; expected {' or '.join(NORMS)}"
            )
        refuse_cut_heads(vision.num_attention_heads, vision.hidden_size)
        for name in ("image_size", "patch_size"):
            sides = getattr(vision, name)
            if len(set(sides)) != 1:
                raise LVLMError(f"vision_config.{name} {list(sides)} is not supported; expected two equal sides")
        return cls(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_layers=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            image_size=vision.image_size[0],
            patch_size=vision.patch_size[0],
            hidden_act=activation_name("vision_config.hidden_act", vision.hidden_act),
            norm=vision.norm_type,
            layer_norm_eps=vision.layer_norm_eps,
            attention_bias=vision.attention_bias,
            qk_norm=vision.use_qk_norm,
            positions=vision.use_absolute_position_embeddings,
            mask_token=vision.use_mask_token,
            final_norm=not vision.use_mean_pooling,
            layer_scale=vision.layer_scale_init_value,
        )


class InternVitAttention(nn.Module):
    """Bidirectional multi-head attention over the patches of one tile."""

    config: InternVitConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "R P W"]) -> Float[Array, "R P W"]:
        config = self.config

        def project(name: str, norm: str | None = None) -> Float[Array, "R P H D"]:
            flat = linear(config.hidden_size, self.dtype, name, use_bias=config.attention_bias)(x)
            if norm and config.qk_norm:
                flat = rms_norm(QK_NORM_EPS, self.dtype, norm)(flat)
            return flat.reshape(*x.shape[:2], config.num_heads, -1)

        query, key = project("q_proj", "q_norm"), project("k_proj", "k_norm")
        mixed = picture_attention(query, key, project("v_proj"))
        return linear(config.hidden_size, self.dtype, "out_proj", use_bias=True)(mixed.reshape(x.shape))


class InternVitMlp(nn.Module):
    """Two projections around the activation, with biases."""

    config: InternVitConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "R P W"]) -> Float[Array, "R P W"]:
        hidden = linear(self.config.intermediate_size, self.dtype, "fc1", use_bias=True)(x)
        return linear(x.shape[-1], self.dtype, "fc2", use_bias=True)(activation(self.config.hidden_act)(hidden))


class InternVitLayer(nn.Module):
    """Attention and MLP, each after its norm, scaled channel by channel and added to the residual stream."""

    config: InternVitConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "R P W"]) -> Float[Array, "R P W"]:
        config = self.config

        def norm(name: str) -> nn.Module:
            return NORMS[config.norm](config.layer_norm_eps, self.dtype, name)

        def scale(name: str) -> Float[Array, "W"]:
            initializer = nn.initializers.constant(config.layer_scale)
            return self.param(name, initializer, (config.hidden_size,)).astype(self.dtype)

        normed = norm("layer_norm1")(x)
        x = x + scale("scale1") * InternVitAttention(config, self.dtype, name="self_attn")(normed)
        normed = norm("layer_norm2")(x)
        return x + scale("scale2") * InternVitMlp(config, self.dtype, name="mlp")(normed)


class InternVit(nn.Module):
    """Maps tiles to hidden states."""

    config: InternVitConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixels: Float[Array, "R 3 Y X"]) -> list[Float[Array, "R P W"]]:
        """Returns the hidden states of R tiles: the embeddings, each layer's output, and the last output after the
        final norm.

        P counts the class token and the patches, row by row. Without a final norm, the last two are equal.
        """
        config, width = self.config, self.config.hidden_size
        patches = patch_convolution(pixels, width, config.patch_size, self.dtype, "patch_embedding", use_bias=True)
        initializer = nn.initializers.normal(0.02)
        token = self.param("class_embedding", initializer, (1, 1, width)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (len(pixels), 1, width)), patches], axis=1)
        if config.positions:
            positions = self.param("position_embedding", initializer, (1, config.side**2 + 1, width))
            x = x + positions.astype(self.dtype)
        if config.mask_token:  # the checkpoint has this parameter, although nothing is hidden here
            self.param("mask_token", initializer, (1, 1, width))
        states = [x]
        for index in range(config.num_layers):
            states.append(InternVitLayer(config, self.dtype, name=f"layers_{index}")(states[-1]))
        last = states[-1]
        states.append(
            layer_norm(config.layer_norm_eps, self.dtype, "post_layernorm")(last) if config.final_norm else last
        )
        return states
