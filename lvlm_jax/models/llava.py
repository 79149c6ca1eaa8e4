"""LLaVA-1.5 (arXiv 2310.03744): CLIP tower, two-layer connector, LLaMA-like decoder."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.clip import ClipTower, VisionConfig
from lvlm_jax.models.config import activation_name, decoder_config, special_tokens
from lvlm_jax.models.decoder import Decoder
from lvlm_jax.models.family import FamilyConfig, VisionLanguageModel, family
from lvlm_jax.models.layers import activation, linear
from lvlm_jax.models.pictures import Arrays, Pictures, square_map, square_pixels, whole_pictures
from lvlm_jax.models.vision import by_pictures, class_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaConfig(FamilyConfig):
    """LLaVA-1.5: CLIP tower, two-layer connector, LLaMA-like decoder.

    Attributes:
        feature_layers: indices into the tower's hidden states (0 is the embedding), concatenated over channels.
        feature_select: "default" drops the class token, "full" keeps it.
    """

    vision: VisionConfig
    feature_layers: tuple[int, ...]
    feature_select: str
    projector_act: str
    projector_bias: bool
    model_type: str = "llava"

    @property
    def tokens_per_image(self) -> int:
        """How many tokens every image takes."""
        return self.vision.num_patches + (self.feature_select == "full")

    @classmethod
    def from_hf(cls, raw: dict, hf: Any) -> "LlavaConfig":
        """Reads a transformers `LlavaConfig` object; `raw` is its original dict.

        Raises:
            LVLMError: a part of the configuration is not supported.
        """
        vision = VisionConfig.from_hf(hf.vision_config)
        return cls(
            text=decoder_config(hf),
            vision=vision,
            image_token_id=hf.image_token_index,
            feature_layers=feature_layers(hf, vision.num_layers),
            feature_select=feature_select(hf),
            projector_act=activation_name("projector_hidden_act", hf.projector_hidden_act),
            projector_bias=hf.multimodal_projector_bias,
            hf=raw,
            **special_tokens(hf),
        )

    @property
    def processor_fields(self) -> dict[str, Any]:
        """Settings with which LLaVA's processor counts placeholders."""
        return processor_fields(self)

    def pictures(self, parts: Sequence[Arrays], prompts: Sequence[np.ndarray]) -> Pictures | None:
        """The tower's inputs, from a processor's `pixel_values` `[I, 3, Y, X]`; None without images.

        Raises:
            LVLMError: pixels have another shape or are not finite.
        """
        del prompts
        pixels = square_pixels(parts, self.vision.image_size)
        return None if pixels is None else whole_pictures(pixels, self.tokens_per_image)

    def blank(self) -> Pictures:
        """One empty image, in the form of `pictures`."""
        side = self.vision.image_size
        return whole_pictures(np.zeros((1, 3, side, side), np.float32), self.tokens_per_image)

    def token_map(self, pictures: Pictures, image: int) -> Int[np.ndarray, "H W"]:
        """For each position of the image, the index of the image token that covers it."""
        del pictures, image
        return square_map(self.vision.num_patches, first=int(self.feature_select == "full"))


def processor_fields(config: FamilyConfig) -> dict[str, Any]:
    """Settings with which the processors of LLaVA and LLaVA-NeXT count placeholders."""
    return {
        "patch_size": config.vision.patch_size,
        "vision_feature_select_strategy": config.feature_select,
        "num_additional_image_tokens": 1,  # the class token
    }


def feature_layers(hf: Any, depth: int) -> tuple[int, ...]:
    """`vision_feature_layer` as indices into the `depth` + 1 hidden states of a tower.

    Raises:
        LVLMError: an index is outside them.
    """
    layers = hf.vision_feature_layer
    layers = (layers,) if isinstance(layers, int) else tuple(layers)
    for layer in layers:
        if not -depth - 1 <= layer <= depth:
            raise LVLMError(f"vision_feature_layer {layer} is outside the tower's {depth + 1} hidden states")
    return layers


def feature_select(hf: Any) -> str:
    """The configuration's `vision_feature_select_strategy`.

    Raises:
        LVLMError: it is neither "default" nor "full".
    """
    strategy = hf.vision_feature_select_strategy
    if strategy not in ("default", "full"):
        raise LVLMError(f"vision_feature_select_strategy {strategy!r} is not supported; expected 'default' or 'full'")
    return strategy


class Connector(nn.Module):
    """Maps vision features to decoder embeddings, patch by patch."""

    config: LlavaConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features: Float[Array, "I P W"]) -> Float[Array, "I P E"]:
        width, bias = self.config.text.hidden_size, self.config.projector_bias
        hidden = linear(width, self.dtype, "linear_1", use_bias=bias)(features)
        return linear(width, self.dtype, "linear_2", use_bias=bias)(activation(self.config.projector_act)(hidden))


@family("llava")
class Llava(VisionLanguageModel):
    """LLaVA-1.5."""

    config: LlavaConfig

    def setup(self):
        self.vision_tower = ClipTower(self.config.vision, self.dtype)
        self.connector = Connector(self.config, self.dtype)
        self.language_model = Decoder(self.config.text, self.dtype, self.remat)

    def image_features(self, pixels: Float[Array, "I 3 Y X"]) -> Float[Array, "I P W"]:
        """The chosen hidden states of the tower, concatenated over channels."""
        states = self.vision_tower(pixels.astype(self.dtype))
        chosen = jnp.concatenate([states[layer] for layer in self.config.feature_layers], axis=-1)
        return chosen[:, 1:] if self.config.feature_select == "default" else chosen

    def salience(self, pixels: Float[Array, "I 3 Y X"]) -> Float[Array, "N"]:
        """The attention that the class token pays to each image token, in the last layer that the connector reads."""
        layer = max(self.config.feature_layers[-1] % (self.config.vision.num_layers + 1) - 1, 0)
        ranked = self._by_pictures(
            lambda model, part: class_attention(lambda: model.image_features(part), layer), pixels
        )
        if self.config.feature_select == "full":  # the class token is an image token too
            ranked = jnp.pad(ranked, ((0, 0), (1, 0)))
        return ranked.reshape(-1)

    def encode_images(self, pixels: Float[Array, "I 3 Y X"]) -> Float[Array, "I P E"]:
        """Image tokens of I images, for the decoder."""
        return self._by_pictures(lambda model, part: model.connector(model.image_features(part)), pixels)

    def _by_pictures(self, look: Callable[..., Array], pixels: Float[Array, "I 3 Y X"]) -> Array:
        return by_pictures(self, look, pixels, self.config.vision.num_patches)
