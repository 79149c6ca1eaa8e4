"""LLaMA and similar models by themselves: a language model without a tower, for text only."""

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.config import decoder_config, special_tokens
from lvlm_jax.models.decoder import Decoder
from lvlm_jax.models.family import FamilyConfig, VisionLanguageModel, family
from lvlm_jax.models.pictures import Arrays, Pictures, whole_pictures


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(FamilyConfig):
    """A decoder without a vision tower. The image placeholder is outside the vocabulary, so no prompt contains it."""

    vision: None = None
    model_type: str = "llama"

    @classmethod
    def from_hf(cls, raw: dict, hf: Any) -> "LlamaConfig":
        """Reads a transformers `LlamaConfig` object; `raw` is its original dict.

        Raises:
            LVLMError: a part of the configuration is not supported.
        """
        composite = SimpleNamespace(text_config=hf, tie_word_embeddings=hf.tie_word_embeddings)
        text = decoder_config(composite)
        return cls(text=text, image_token_id=text.vocab_size, hf=raw, **special_tokens(composite))

    def pictures(self, parts: Sequence[Arrays], prompts: Sequence[np.ndarray]) -> Pictures | None:
        """None: there is no tower.

        Raises:
            LVLMError: images were given.
        """
        if any(part.get("pixel_values") is not None for part in parts):
            raise LVLMError("this is a language model without a vision tower; ask it without images")
        return None

    def blank(self) -> Pictures:
        """One pixel, which becomes one token."""
        return whole_pictures(np.zeros((1, 3, 1, 1), np.float32), 1)

    def token_map(self, pictures: Pictures, image: int) -> Int[np.ndarray, "H W"] | None:
        """None: tokens have no positions in an image."""
        return None


@family("llama")
class Llama(VisionLanguageModel):
    """A LLaMA."""

    config: LlamaConfig

    def setup(self):
        self.language_model = Decoder(self.config.text, self.dtype, self.remat)

    def encode_images(self, pixels: Float[Array, "I 3 Y X"]) -> Float[Array, "I P E"]:
        """Zeros, for programs that take an image even if the prompt has none."""
        return jnp.zeros((pixels.shape[0], 1, self.config.text.hidden_size), self.dtype)
