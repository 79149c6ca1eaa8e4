"""Qwen2.5-VL (arXiv 2502.13923): Qwen2-VL with window attention in most tower layers, gated MLPs, RMS norms."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.attention.rotary import Rotation
from lvlm_jax.errors import LVLMError
from lvlm_jax.models.decoder import Decoder
from lvlm_jax.models.family import family
from lvlm_jax.models.layers import rms_norm
from lvlm_jax.models.loose_patches import PatchTowerConfig, tower_sizes
from lvlm_jax.models.qwen2_vl import EPSILON, Qwen2Vl, Qwen2VlConfig
from lvlm_jax.models.qwen_vision import (
    Attention,
    GatedMlp,
    PatchAttention,
    PatchEmbedding,
    PatchMerger,
    apply_in_chunks,
    axial_rotation,
    window_attention,
    window_numbers,
)
from lvlm_jax.models.vision import picture_attention


@dataclasses.dataclass(frozen=True)
class WindowTowerConfig(PatchTowerConfig):
    """A tower over loose patches; most of its layers attend within windows.

    Attributes:
        window: side of a window in patches, a multiple of `merge`.
        full_layers: the layers that attend over the whole image.
    """

    window: int
    full_layers: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen25VlConfig(Qwen2VlConfig):
    """Qwen2.5-VL; attributes as in Qwen2-VL."""

    vision: WindowTowerConfig
    model_type: str = "qwen2_5_vl"

    @staticmethod
    def tower_from_hf(vision: Any) -> WindowTowerConfig:
        """Reads a transformers `Qwen2_5_VLVisionConfig`.

        Raises:
            LVLMError: a value that is not supported.
        """
        sizes = tower_sizes(vision, vision.hidden_size, vision.intermediate_size)
        # Windows contain whole tokens; a size that is not a multiple of a token's is rounded down.
        tokens = vision.window_size // sizes["merge"] // sizes["patch_size"]
        if tokens < 1:
            raise LVLMError(
                f"vision_config.window_size {vision.window_size} is not supported; expected at least "
                f"{sizes['merge'] * sizes['patch_size']} pixels, the side of a token"
            )
        return WindowTowerConfig(
            **sizes, window=tokens * sizes["merge"], full_layers=tuple(vision.fullatt_block_indexes)
        )


class TowerLayer(nn.Module):
    """Attention and gated MLP, each after its norm and added to the residual stream."""

    config: WindowTowerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "R P W"], rotation: Rotation, attention: Attention) -> Float[Array, "R P W"]:
        normed = rms_norm(EPSILON, self.dtype, "norm1")(x)
        x = x + PatchAttention(self.config, self.dtype, name="self_attn")(normed, rotation, attention)
        normed = rms_norm(EPSILON, self.dtype, "norm2")(x)
        return x + apply_in_chunks(GatedMlp(self.config, self.dtype, name="mlp"), normed)


class WindowTower(nn.Module):
    """Maps patches to features."""

    config: WindowTowerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, patches: Float[Array, "R P C"], coordinates: Int[Array, "R P 2"], valid: Bool[Array, "R P"]
    ) -> Float[Array, "R P W"]:
        config = self.config
        windows = window_numbers(coordinates, valid, config.window)
        # The patches of a window become neighbours; filler comes last.
        order = jnp.argsort(windows, axis=1, stable=True)

        def ordered(array: Array, order: Array) -> Array:
            return jnp.take_along_axis(array, jnp.expand_dims(order, range(2, array.ndim)), axis=1)

        x = ordered(PatchEmbedding(config, self.dtype, name="patch_embedding")(patches), order)
        rotation = axial_rotation(ordered(coordinates, order), config.head_dim, config.rope_theta)
        inside = functools.partial(window_attention, windows=ordered(windows, order), size=config.window**2)
        over_all = functools.partial(picture_attention, valid=ordered(valid, order))
        for index in range(config.num_layers):
            attention = over_all if index in config.full_layers else inside
            x = TowerLayer(config, self.dtype, name=f"layers_{index}")(x, rotation, attention)
        return ordered(x, jnp.argsort(order, axis=1))


@family("qwen2_5_vl")
class Qwen25Vl(Qwen2Vl):
    """Qwen2.5-VL."""

    config: Qwen25VlConfig

    def setup(self):
        config = self.config
        self.vision_tower = WindowTower(config.vision, self.dtype)
        self.connector = PatchMerger(
            config.text.hidden_size, config.vision.merge**2, self.dtype, root_mean_square=True, epsilon=EPSILON
        )
        self.language_model = Decoder(config.text, self.dtype, self.remat)
