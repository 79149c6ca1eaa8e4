"""Qwen3-VL (arXiv 2511.21631): a tower for images of any size; several of its layers feed the decoder.

The merged patches of the last layer are the image tokens. Merged patches of earlier layers are added to the residual
stream at the image tokens, after the first layers of the decoder (DeepStack, arXiv 2406.04334).
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.config import DecoderConfig, decoder_config, special_tokens
from lvlm_jax.models.decoder import Decoder
from lvlm_jax.models.family import VisionLanguageModel, family
from lvlm_jax.models.interpolation import ResampledPositions, corner_aligned, linear_taps, with_positions
from lvlm_jax.models.loose_patches import LoosePatchConfig, PatchTowerConfig, check_width, tower_sizes
from lvlm_jax.models.pictures import Pictures
from lvlm_jax.models.qwen2_vl import EPSILON, TowerLayer
from lvlm_jax.models.qwen_vision import (
    PatchEmbedding,
    PatchMerger,
    axial_rotation,
    in_reading_order,
    tokens_by_pictures,
)
from lvlm_jax.models.vision import picture_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3VlConfig(LoosePatchConfig):
    """Qwen3-VL with a dense decoder.

    Attributes:
        position_count: number of entries in the tower's table of positions; the largest square of them is used.
        deepstack: layers of the tower whose patches go to the decoder, in the order of their mergers.
    """

    position_count: int
    deepstack: tuple[int, ...]
    model_type: str = "qwen3_vl"

    @classmethod
    def from_hf(cls, raw: dict, hf: Any) -> "Qwen3VlConfig":
        """Reads a transformers `Qwen3VLConfig` object; `raw` is its original dict.

        Raises:
            LVLMError: a part of the configuration is not supported.
        """
        vision, text = hf.vision_config, decoder_config(hf)
        if not text.rope.interleaved:
            raise LVLMError("rope_parameters.mrope_interleaved false is not supported; expected true")
        check_width(vision, text)
        return cls(
            text=text,
            vision=PatchTowerConfig(**tower_sizes(vision, vision.hidden_size, vision.intermediate_size)),
            position_count=vision.num_position_embeddings,
            deepstack=_deepstack(vision, text),
            image_token_id=hf.image_token_id,
            video_token_id=hf.video_token_id,
            hf=raw,
            **special_tokens(hf),
        )

    def with_geometry(self, pictures: Pictures) -> Pictures:
        """The same pictures, with each patch's place in the tower's table of positions."""
        side = math.isqrt(self.position_count)
        return with_positions(pictures, self.vision.merge, side, corner_aligned, linear_taps)


def _deepstack(vision: Any, text: DecoderConfig) -> tuple[int, ...]:
    """`deepstack_visual_indexes`.

    Raises:
        LVLMError: a layer is outside the tower or occurs twice, or there are more layers than in the decoder.
    """
    layers = tuple(vision.deepstack_visual_indexes)
    if len(set(layers)) < len(layers) or not set(layers) <= set(range(vision.depth)):
        raise LVLMError(
            f"vision_config.deepstack_visual_indexes {list(layers)} is not supported; expected different layers "
            f"from 0 to {vision.depth - 1}"
        )
    if len(layers) > text.num_layers:
        raise LVLMError(
            f"vision_config.deepstack_visual_indexes names {len(layers)} layers; expected at most one for each of "
            f"the decoder's {text.num_layers}"
        )
    return layers


class Tower(nn.Module):
    """Maps patches to the output of every layer."""

    config: Qwen3VlConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        pixels: Float[Array, "R P C"],
        coordinates: Int[Array, "R P 2"],
        valid: Bool[Array, "R P"],
        entries: Int[Array, "R P 4"],
        weights: Float[Array, "R P 4"],
    ) -> list[Float[Array, "R P W"]]:
        vision = self.config.vision
        x = PatchEmbedding(vision, self.dtype, use_bias=True, name="patch_embedding")(pixels)
        table = ResampledPositions(self.config.position_count, vision.hidden_size, name="position_embedding")
        x = x + table(entries, weights).astype(self.dtype)
        rotation = axial_rotation(coordinates, vision.head_dim, vision.rope_theta)
        outputs = []
        attention = functools.partial(picture_attention, valid=valid)
        for index in range(vision.num_layers):
            x = TowerLayer(vision, self.dtype, name=f"layers_{index}")(x, rotation, attention)
            outputs.append(x)
        return outputs


class Connector(nn.Module):
    """Maps tower outputs to image tokens: the decoder's input, then the additions after its first layers."""

    config: Qwen3VlConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, outputs: list[Float[Array, "R P W"]]) -> Float[Array, "R M E_and_added"]:
        features, unit = self.config.text.hidden_size, self.config.vision.merge**2
        tokens = [PatchMerger(features, unit, self.dtype, epsilon=EPSILON, name="merger")(outputs[-1])]
        # The decoder uses them in the order of the tower's layers, whatever the order of their mergers.
        for layer in sorted(self.config.deepstack):
            name = f"deepstack_layers_{self.config.deepstack.index(layer)}"
            # These normalise all patches of a token together.
            blocks = outputs[layer].reshape(outputs[layer].shape[0], -1, unit * outputs[layer].shape[2])
            tokens.append(PatchMerger(features, 1, self.dtype, epsilon=EPSILON, name=name)(blocks))
        return jnp.concatenate(tokens, axis=-1)


@family("qwen3_vl")
class Qwen3Vl(VisionLanguageModel):
    """Qwen3-VL with a dense decoder."""

    config: Qwen3VlConfig

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
        entries: Int[Array, "R P 4"],
        weights: Float[Array, "R P 4"],
    ) -> Float[Array, "N E_and_added"]:
        """Image tokens in reading order, then filler; the geometry is that of `patch_rows` and `with_positions`."""
        return in_reading_order(tokens_by_pictures(self, pixels, coordinates, valid, entries, weights), order)
