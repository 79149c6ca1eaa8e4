"""The SigLIP vision tower (arXiv 2303.15343), up to its hidden states.

It is CLIP's stack of layers, without a class token and without a norm before them.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.clip import ClipLayer, VisionConfig
from lvlm_jax.models.config import activation_name, refuse_cut_heads
from lvlm_jax.models.layers import layer_norm
from lvlm_jax.models.vision import patch_convolution


@dataclasses.dataclass(frozen=True)
class SiglipConfig(VisionConfig):
    """A SigLIP vision tower. Sizes in pixels."""

    @property
    def side(self) -> int:
        """Number of patches along each side of an image of `image_size`."""
        return self.image_size // self.patch_size

    @classmethod
    def from_hf(cls, vision: Any, model_types: tuple[str, ...] = ("siglip_vision_model",)) -> "SiglipConfig":
        """Reads a transformers `SiglipVisionConfig`, or a configuration with the same fields and one of `model_types`.

        Raises:
            LVLMError: unsupported `model_type` or activation, images or patches that are not square, or a pooling head.
        """
        if vision.model_type not in model_types:
            raise LVLMError(
                f"vision_config.model_type {vision.model_type!r} is not supported; expected "
                f"{' or '.join(map(repr, model_types))}"
            )
        if vision.num_channels != 3:
            raise LVLMError(f"vision_config.num_channels {vision.num_channels} is not supported; expected 3")
        if getattr(vision, "vision_use_head", False):
            raise LVLMError(
                "vision_config.vision_use_head true is not supported; expected false: language models do not read "
                "the pooling head, so leave its tensors out of the checkpoint"
            )
        for name in ("image_size", "patch_size"):
            if not isinstance(getattr(vision, name), int):
                raise LVLMError(
                    f"vision_config.{name} {getattr(vision, name)} is not supported; expected one whole number"
                )
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


class SiglipTower(nn.Module):
    """Maps images to hidden states."""

    config: SiglipConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        pixels: Float[Array, "I 3 Y X"],
        positions: Int[Array, "I P"] | None = None,
        mask: Bool[Array, "I P"] | None = None,
    ) -> tuple[list[Float[Array, "I P W"]], Float[Array, "I P W"]]:
        """Runs over I images, whose patches are ordered row by row.

        Args:
            pixels: of size `config.image_size` unless `positions` are given.
            positions: the learned position of each patch; None for 0, 1, 2, ...
            mask: which patches may be seen; None for all.

        Returns:
            The hidden states (the embeddings, then each layer's output), and the last one normalised. Unused results
            cost nothing once compiled.
        """
        config = self.config
        x = patch_convolution(
            pixels, config.hidden_size, config.patch_size, self.dtype, "patch_embedding", use_bias=True
        )
        embedding = nn.Embed(
            config.num_patches, config.hidden_size, dtype=self.dtype,
            embedding_init=nn.initializers.normal(0.02), name="position_embedding",
        )  # fmt: skip
        states = [x + embedding(jnp.arange(config.num_patches) if positions is None else positions)]
        for index in range(config.num_layers):
            states.append(ClipLayer(config, self.dtype, name=f"layers_{index}")(states[-1], mask))
        return states, layer_norm(config.layer_norm_eps, self.dtype, "post_layernorm")(states[-1])
