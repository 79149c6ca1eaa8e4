"""What all model families share: a tower and connector of their own before one and the same decoder."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lvlm_jax.models.decoder import Decoded


class VisionLanguageModel(nn.Module):
    """Base of the families' modules: what generation asks of a model.

    A family has the fields `config`, `dtype` and `remat`, makes `language_model` (a `Decoder`) and its tower in
    `setup`, and says in `encode_images(pixels, **geometry)` what becomes of `Pictures`: image tokens in reading order,
    as `Float[I, P, E]` or flat `Float[N, E]`, where tokens behind the last image only fill a bucket. Decoders with
    deepstack layers are given tokens of E (1 + layers) channels.
    """

    def embed(
        self, tokens: Int[Array, "B T"], image_tokens: Float[Array, "*N E"] | None = None
    ) -> Float[Array, "B T E"]:
        """Token embeddings, image placeholders replaced by the image tokens in reading order."""
        if image_tokens is None:
            return self.language_model.embed(tokens)
        placeholder = tokens == self.config.image_token_id
        # A placeholder may lie behind the vocabulary; it is replaced, so any word will do.
        embedded = self.language_model.embed(jnp.where(placeholder, 0, tokens))
        flat = image_tokens.reshape(-1, image_tokens.shape[-1]).astype(embedded.dtype)
        embedded = jnp.pad(embedded, ((0, 0), (0, 0), (0, flat.shape[1] - embedded.shape[2])))
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

    def __call__(
        self, tokens: Int[Array, "B T"], pixels: Float[Array, "R ..."], geometry: dict, context
    ) -> jax.Array:
        """Logits of every row, without a cache; also what creates the parameters."""
        image_tokens = self.encode_images(pixels, **geometry)
        return self.head(self.decode(self.embed(tokens, image_tokens)[None], context).hidden[0])
