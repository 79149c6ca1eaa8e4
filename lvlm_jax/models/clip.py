"""The CLIP vision tower (arXiv 2103.00020), up to its hidden states."""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.config import activation_name, refuse_cut_heads
from lvlm_jax.models.layers import activation, layer_norm, linear
from lvlm_jax.models.vision import patch_convolution, picture_attention


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision tower. Sizes in pixels."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float
    qkv_bias: ClassVar[bool] = True  # some towers have no such biases

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_hf(cls, vision: Any) -> "VisionConfig":
        """Reads a transformers `CLIPVisionConfig`.

        Raises:
            LVLMError: unsupported `model_type` or activation.
        """
        if vision.model_type != "clip_vision_model":
            raise LVLMError(
                f"vision_config.model_type {vision.model_type!r} is not supported; expected 'clip_vision_model'"
            )
        if vision.num_channels != 3:
            raise LVLMError(f"vision_config.num_channels {vision.num_channels} is not supported; expected 3")
        refuse_cut_heads(vision.num_attention_heads, vision.hidden_size)
        return cls(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_layers=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            hidden_act=activation_name("vision_config.hidden_act", vision.hidden_act),
            layer_norm_eps=vision.layer_norm_eps,
        )


class ClipAttention(nn.Module):
    """Bidirectional multi-head attention over the patches of one image."""

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "I P W"], mask: Bool[Array, "I P"] | None = None) -> Float[Array, "I P W"]:
        heads, width = self.config.num_heads, self.config.hidden_size

        def project(name: str) -> Float[Array, "I P H D"]:
            bias = self.config.qkv_bias
            return linear(width, self.dtype, name, use_bias=bias)(x).reshape(*x.shape[:2], heads, -1)

        mixed = picture_attention(project("q_proj"), project("k_proj"), project("v_proj"), mask)
        return linear(width, self.dtype, "out_proj", use_bias=True)(mixed.reshape(x.shape))


class ClipMlp(nn.Module):
    """Two projections around the activation, with biases."""

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "I P W"]) -> Float[Array, "I P W"]:
        hidden = linear(self.config.intermediate_size, self.dtype, "fc1", use_bias=True)(x)
        return linear(x.shape[-1], self.dtype, "fc2", use_bias=True)(activation(self.config.hidden_act)(hidden))


class ClipLayer(nn.Module):
    """Attention and MLP, each after its norm and added to the residual stream; `mask` marks visible patches."""

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "I P W"], mask: Bool[Array, "I P"] | None = None) -> Float[Array, "I P W"]:
        epsilon = self.config.layer_norm_eps
        normed = layer_norm(epsilon, self.dtype, "layer_norm1")(x)
        x = x + ClipAttention(self.config, self.dtype, name="self_attn")(normed, mask)
        normed = layer_norm(epsilon, self.dtype, "layer_norm2")(x)
        return x + ClipMlp(self.config, self.dtype, name="mlp")(normed)


class ClipTower(nn.Module):
    """Maps images to hidden states."""

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixels: Float[Array, "I 3 Y X"]) -> list[Float[Array, "I P W"]]:
        """Returns the hidden states of I images: the normalised embeddings, then each layer's output.

        P counts the class token and the patches, row by row. Hidden states that the caller does not use cost nothing
        once compiled.
        """
        config = self.config
        patches = patch_convolution(
            pixels, config.hidden_size, config.patch_size, self.dtype, "patch_embedding", use_bias=False
        )
        images = pixels.shape[0]
        initializer = nn.initializers.normal(0.02)
        token = self.param("class_embedding", initializer, (config.hidden_size,)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (images, 1, config.hidden_size)), patches], axis=1)
        positions = nn.Embed(
            config.num_patches + 1, config.hidden_size, dtype=self.dtype, embedding_init=initializer,
            name="position_embedding",
        )  # fmt: skip
        x = x + positions(jnp.arange(config.num_patches + 1))
        states = [layer_norm(config.layer_norm_eps, self.dtype, "pre_layernorm")(x)]
        for index in range(config.num_layers):
            states.append(ClipLayer(config, self.dtype, name=f"layers_{index}")(states[-1]))
        # Part of every CLIP checkpoint, although language models read the states before it.
        layer_norm(config.layer_norm_eps, self.dtype, "post_layernorm")(states[-1])
        return states
