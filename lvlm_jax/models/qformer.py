"""The Q-Former of InstructBLIP (arXiv 2305.06500): learned queries that attend to an image and an instruction.

A BERT whose sequence consists of the queries and the words of the instruction, which all see each other. In every
second layer the queries (but not the words) also attend to the vision tower's patches. Queries and words have separate
MLPs. Norms come after the residual sums, unlike in the decoder. The final queries are the image tokens.

    query 1 ... query Q | [CLS] what is un ##usual ... [SEP] . . .      words have positions, queries have none
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.models.clip import ClipMlp
from lvlm_jax.models.config import activation_name
from lvlm_jax.models.layers import layer_norm, linear
from lvlm_jax.models.vision import patch_attention


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """A Q-Former.

    Attributes:
        num_queries: number of tokens per image.
        vocab_size: size of its own tokenizer's vocabulary, for the instruction.
        max_position_embeddings: longest instruction, in tokens.
        cross_attention_frequency: layers 0, n, 2 n, ... attend to the patches.
    """

    num_queries: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_position_embeddings: int
    cross_attention_frequency: int
    hidden_act: str
    layer_norm_eps: float

    @classmethod
    def from_hf(cls, qformer: Any, num_queries: int) -> "QFormerConfig":
        """Reads a transformers `InstructBlipQFormerConfig`.

        Raises:
            LVLMError: an unsupported activation.
        """
        return cls(
            num_queries=num_queries,
            vocab_size=qformer.vocab_size,
            hidden_size=qformer.hidden_size,
            intermediate_size=qformer.intermediate_size,
            num_layers=qformer.num_hidden_layers,
            num_heads=qformer.num_attention_heads,
            max_position_embeddings=qformer.max_position_embeddings,
            cross_attention_frequency=qformer.cross_attention_frequency,
            hidden_act=activation_name("qformer_config.hidden_act", qformer.hidden_act),
            layer_norm_eps=qformer.layer_norm_eps,
        )


class QFormerAttention(nn.Module):
    """Multi-head attention to `source_states`, not causal."""

    config: QFormerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "I T C"], source_states: Float[Array, "I S W"], mask: Bool[Array, "I 1 S"] | None = None
    ) -> Float[Array, "I T C"]:
        heads, width = self.config.num_heads, self.config.hidden_size

        def project(name: str, source: Float[Array, "I S W"]) -> Float[Array, "I S H D"]:
            flat = linear(width, self.dtype, name, use_bias=True)(source)
            return flat.reshape(*source.shape[:2], heads, -1)

        mixed = patch_attention(
            project("q_proj", x), project("k_proj", source_states), project("v_proj", source_states), mask
        )
        return linear(width, self.dtype, "out_proj", use_bias=True)(mixed.reshape(x.shape))


class QFormerLayer(nn.Module):
    """Self-attention of queries and words, cross-attention of queries to patches, and an MLP for each of the two."""

    config: QFormerConfig
    dtype: jnp.dtype
    cross_attention: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "I T C"], patches: Float[Array, "I P W"], mask: Bool[Array, "I 1 T"]
    ) -> Float[Array, "I T C"]:
        config = self.config

        def added(name: str, x: Float[Array, "I S C"], change: Float[Array, "I S C"]) -> Float[Array, "I S C"]:
            return layer_norm(config.layer_norm_eps, self.dtype, name)(x + change)

        x = added("self_norm", x, QFormerAttention(config, self.dtype, name="self_attn")(x, x, mask))
        queries, words = x[:, : config.num_queries], x[:, config.num_queries :]
        if self.cross_attention:
            change = QFormerAttention(config, self.dtype, name="cross_attn")(queries, patches)
            queries = added("cross_norm", queries, change)
        queries = added("query_norm", queries, ClipMlp(config, self.dtype, name="query_mlp")(queries))
        words = added("text_norm", words, ClipMlp(config, self.dtype, name="text_mlp")(words))
        return jnp.concatenate([queries, words], axis=1)


class QFormer(nn.Module):
    """Maps patches and an instruction to the final queries."""

    config: QFormerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, patches: Float[Array, "I P W"], words: Int[Array, "I L"], mask: Bool[Array, "I L"]
    ) -> Float[Array, "I Q C"]:
        """Reads I images.

        Args:
            patches: the vision tower's hidden states.
            words: each image's instruction, as ids of the Q-Former's own vocabulary, padded.
            mask: which of these ids are words.
        """
        config = self.config
        initializer = nn.initializers.normal(0.02)

        def embedding(count: int, name: str) -> nn.Embed:
            return nn.Embed(count, config.hidden_size, dtype=self.dtype, embedding_init=initializer, name=name)

        queries = self.param("query_tokens", initializer, (1, config.num_queries, config.hidden_size))
        queries = jnp.broadcast_to(queries.astype(self.dtype), (words.shape[0], *queries.shape[1:]))
        # Padding may exceed the last position; there are no words there.
        places = jnp.minimum(jnp.arange(words.shape[1]), config.max_position_embeddings - 1)
        read = embedding(config.vocab_size, "word_embedding")(words)
        read = read + embedding(config.max_position_embeddings, "position_embedding")(places)
        x = jnp.concatenate([queries, read], axis=1)
        x = layer_norm(config.layer_norm_eps, self.dtype, "embedding_norm")(x)
        visible = jnp.concatenate([jnp.ones((words.shape[0], config.num_queries), bool), mask], axis=1)
        for index in range(config.num_layers):
            cross = index % config.cross_attention_frequency == 0
            x = QFormerLayer(config, self.dtype, cross, name=f"layers_{index}")(x, patches, visible[:, None])
        return x[:, : config.num_queries]
