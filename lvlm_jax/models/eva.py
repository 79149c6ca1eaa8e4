"""The EVA-CLIP vision tower (arXiv 2303.15389) as BLIP-2 and InstructBLIP use it: ViT-g without its last layer.

It is CLIP's stack of layers, without a norm before them; the patch projection has a bias. The connector reads the
normalised last hidden state, class token included.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.clip import ClipLayer, VisionConfig
from lvlm_jax.models.config import activation_name
from lvlm_jax.models.layers import layer_norm
from lvlm_jax.models.vision import patch_convolution


@dataclasses.dataclass(frozen=True)
class EvaConfig(VisionConfig):
    """An EVA-CLIP vision tower. Sizes in pixels; `qkv_bias`: whether queries, keys and values have a bias."""

    qkv_bias: bool = True

    @classmethod
    def from_hf(cls, vision: Any) -> "EvaConfig":
        """Reads a transformers `InstructBlipVisionConfig`.

        Raises:
            LVLMError: an unsupported activation, or images or patches that are not square.
        """
        for name in ("image_size", "patch_size"):
            if not isinstance(getattr(vision, name), int):
                raise LVLMError(
                    f"vision_config.{name} {getattr(vision, name)} is not supported; expected one whole number"
                )
        return cls(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_layers=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            hidden_act=activation_name("vision_config.hidden_act", vision.hidden_act),
            layer_norm_eps=vision.layer_norm_eps,
            qkv_bias=vision.qkv_bias,
        )


class EvaTower(nn.Module):
    """Maps images to the tower's last hidden state."""

    config: EvaConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixels: Float[Array, "I 3 Y X"]) -> Float[Array, "I P W"]:
        """P counts the class token and the patches, row by row."""
        config = self.config
        patches = patch_convolution(
            pixels, config.hidden_size, config.patch_size, self.dtype, "patch_embedding", use_bias=True
        )
        initializer = nn.initializers.normal(0.02)
        token = self.param("class_embedding", initializer, (1, 1, config.hidden_size))
        positions = self.param("position_embedding", initializer, (1, config.num_patches + 1, config.hidden_size))
        token = jnp.broadcast_to(token.astype(self.dtype), (pixels.shape[0], 1, config.hidden_size))
        x = jnp.concatenate([token, patches], axis=1) + positions.astype(self.dtype)
        for index in range(config.num_layers):
            x = ClipLayer(config, self.dtype, name=f"layers_{index}")(x)
        return layer_norm(config.layer_norm_eps, self.dtype, "post_layernorm")(x)
