"""LLaVA-1.5 (arXiv 2310.03744): CLIP tower, two-layer connector, LLaMA-like decoder."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lvlm_jax.models.clip import ClipTower
from lvlm_jax.models.config import LlavaConfig
from lvlm_jax.models.decoder import Decoded, Decoder
from lvlm_jax.models.layers import activation, linear


class Connector(nn.Module):
    """Vision features to decoder embeddings, patch by patch."""

    config: LlavaConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features: Float[Array, "I P W"]) -> Float[Array, "I P E"]:
        width, bias = self.config.text.hidden_size, self.config.projector_bias
        hidden = linear(width, self.dtype, "linear_1", use_bias=bias)(features)
        return linear(width, self.dtype, "linear_2", use_bias=bias)(
            activation(self.config.projector_act)(hidden)
        )


class Llava(nn.Module):
    """A family's module: generation needs `encode_images`, `embed`, `decode`, `head` and `exit_logits` of it."""

    config: LlavaConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self):
        self.vision_tower = ClipTower(self.config.vision, self.dtype)
        self.connector = Connector(self.config, self.dtype)
        self.language_model = Decoder(self.config.text, self.dtype, self.remat)

    def image_features(self, pixels: Float[Array, "I 3 Y X"]) -> Float[Array, "I P W"]:
        """The chosen hidden states of the tower, side by side in the channels."""
        states = self.vision_tower(pixels.astype(self.dtype))
        chosen = jnp.concatenate([states[layer] for layer in self.config.feature_layers], axis=-1)
        return chosen[:, 1:] if self.config.feature_select == "default" else chosen

    def encode_images(self, pixels: Float[Array, "I 3 Y X"]) -> Float[Array, "I P E"]:
        """Image tokens of I images, as the decoder receives them."""
        return self.connector(self.image_features(pixels))

    def embed(
        self, tokens: Int[Array, "B T"], image_tokens: Float[Array, "I P E"] | None = None
    ) -> Float[Array, "B T E"]:
        """Token embeddings, image placeholders replaced by the image tokens in reading order."""
        embedded = self.language_model.embed(tokens)
        if image_tokens is None:
            return embedded
        flat = image_tokens.reshape(-1, image_tokens.shape[-1]).astype(embedded.dtype)
        placeholder = tokens == self.config.image_token_id
        order = jnp.cumsum(placeholder.reshape(-1)).reshape(tokens.shape) - 1
        return jnp.where(placeholder[..., None], flat[jnp.clip(order, 0, flat.shape[0] - 1)], embedded)

    def decode(self, x, contexts, caches=None, transforms=None, tap=None) -> Decoded:
        """See `Decoder.__call__`."""
        return self.language_model(x, contexts, caches, transforms, tap)

    def exit_logits(self, hidden: Float[Array, "*T E"], norm: bool) -> Float[Array, "*T V"]:
        """See `Decoder.exit_logits`."""
        return self.language_model.exit_logits(hidden, norm)

    def head(self, hidden: Float[Array, "*T E"]) -> Float[Array, "*T V"]:
        """Next-token logits in float32."""
        return self.language_model.head(hidden)

    def __call__(self, tokens: Int[Array, "B T"], pixels: Float[Array, "I 3 Y X"], context) -> jax.Array:
        """Logits of every row, without a cache; also what creates the parameters."""
        decoded = self.decode(self.embed(tokens, self.encode_images(pixels))[None], context)
        return self.head(decoded.hidden[0])
