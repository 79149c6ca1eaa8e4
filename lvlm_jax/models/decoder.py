"""The LLaMA-like decoder: LLaMA, Vicuna, Mistral, Qwen2, Qwen3 and InternLM differ by configuration only.

Hidden states carry a leading branch axis, `Float[Array, "N B T E"]`: one pass over the weights serves greedy
decoding (N = 1) and a contrastive method (N = 2) alike.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lvlm_jax.attention.attend import LayerEdits, attend
from lvlm_jax.attention.cache import Block, LayerCache
from lvlm_jax.attention.context import Context
from lvlm_jax.attention.rotary import Rotation, frequencies, rotate
from lvlm_jax.attention.transform import Transform
from lvlm_jax.models.config import DecoderConfig
from lvlm_jax.models.layers import activation, linear, rms_norm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotations:
    """The rotations of one forward pass, the same in every layer: of the rows, and of `Context.image_shift`."""

    rows: Rotation
    shift: Rotation | None

    @classmethod
    def of(cls, config: DecoderConfig, context: Context) -> "Rotations":
        frequency = frequencies(config.rope, config.head_dim)
        rows = Rotation.at(context.positions, frequency, config.rope.scale()).heads(axis=1)
        return cls(rows, None if context.image_shift is None else Rotation.at(context.image_shift, frequency))


class Decoded(NamedTuple):
    """What one pass through the decoder gives.

    Attributes:
        hidden: final normalised hidden states.
        columns: per layer the columns that were seen: fresh ones in prefill, the updated caches in decode.
        carries: the last carry of each branch.
        attention: the last row's weights in every layer, if tapped.
    """

    hidden: Float[Array, "N B T E"]
    columns: tuple[LayerCache, ...]
    carries: tuple
    attention: Float[Array, "L N B H S"] | None


class DecoderAttention(nn.Module):
    """Projections, rotary positions and cache of one layer around `attention.attend`."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "N B T E"],
        context: Context,
        rotations: Rotations,
        cache: LayerCache | None,
        edits: LayerEdits,
    ) -> tuple[Float[Array, "N B T E"], LayerCache, tuple, Float[Array, "N B H S"] | None]:
        config = self.config

        def project(name: str, heads: int, norm: str | None = None) -> Float[Array, "N B H T D"]:
            flat = linear(heads * config.head_dim, self.dtype, name, use_bias=config.attention_bias)(x)
            split = flat.reshape(*x.shape[:3], heads, config.head_dim)
            if norm and config.qk_norm:
                split = rms_norm(config.rms_norm_eps, self.dtype, norm)(split)
            return split.swapaxes(2, 3)

        query = project("q_proj", config.num_heads, "q_norm")
        key = rotate(project("k_proj", config.num_kv_heads, "k_norm"), rotations.rows)
        value = project("v_proj", config.num_kv_heads)
        columns = _columns(cache, key, value, context)
        mixed, carries, tapped = attend(
            tuple(rotate(query, rotations.rows)),
            columns,
            context,
            rotations.shift,
            edits,
            config.window(edits.layer),
        )
        merged = jnp.stack(mixed).swapaxes(2, 3).reshape(*x.shape[:3], -1).astype(self.dtype)
        output = linear(config.hidden_size, self.dtype, "o_proj", use_bias=config.output_bias)(merged)
        return output, columns, carries, tapped


def _columns(cache: LayerCache | None, key: jax.Array, value: jax.Array, context: Context) -> LayerCache:
    """What the rows see: in prefill the prefix and their own fresh columns, in decode the caches they write into."""
    fresh = tuple(Block(k, v) for k, v in zip(key, value, strict=True))
    if cache is None:
        return LayerCache(None, fresh)
    if context.phase == "prefill":
        return LayerCache(cache.prefix, fresh)
    index = context.first_row - (cache.prefix.length if cache.prefix else 0)
    return LayerCache(
        cache.prefix, tuple(own.write(new, index) for own, new in zip(cache.own, fresh, strict=True))
    )


class DecoderMlp(nn.Module):
    """Gated MLP: down(act(gate(x)) · up(x))."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "N B T E"]) -> Float[Array, "N B T E"]:
        config = self.config

        def project(features: int, name: str) -> nn.Dense:
            return linear(features, self.dtype, name, use_bias=config.mlp_bias)

        gate = activation(config.hidden_act)(project(config.intermediate_size, "gate_proj")(x))
        return project(config.hidden_size, "down_proj")(
            gate * project(config.intermediate_size, "up_proj")(x)
        )


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind its norm and added to the stream."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, context, rotations, cache, edits):
        epsilon = self.config.rms_norm_eps
        normed = rms_norm(epsilon, self.dtype, "input_layernorm")(x)
        mixed, columns, carries, tapped = DecoderAttention(self.config, self.dtype, name="self_attn")(
            normed, context, rotations, cache, edits
        )
        x = x + mixed
        normed = rms_norm(epsilon, self.dtype, "post_attention_layernorm")(x)
        return x + DecoderMlp(self.config, self.dtype, name="mlp")(normed), columns, carries, tapped


class Decoder(nn.Module):
    """Embeddings to hidden states to logits.

    Attributes:
        config: sizes and switches.
        dtype: compute dtype; float32 for norms, angles and softmax regardless.
        remat: recompute each layer in the backward pass instead of keeping its activations.
    """

    config: DecoderConfig
    dtype: jnp.dtype
    remat: bool = False

    def setup(self):
        config = self.config
        initializer = nn.initializers.normal(0.02)
        self.embed_tokens = nn.Embed(
            config.vocab_size, config.hidden_size, dtype=self.dtype, embedding_init=initializer
        )
        layer = nn.remat(DecoderLayer) if self.remat else DecoderLayer
        self.layers = [layer(config, self.dtype) for _ in range(config.num_layers)]
        self.norm = rms_norm(config.rms_norm_eps, self.dtype, None)
        if not config.tie_word_embeddings:
            self.lm_head = linear(config.vocab_size, self.dtype, None)

    def embed(self, tokens: Int[Array, "*T"]) -> Float[Array, "*T E"]:
        return self.embed_tokens(tokens)

    def __call__(
        self,
        x: Float[Array, "N B T E"],
        context: Context,
        caches: tuple[LayerCache, ...] | None = None,
        transforms: tuple[Transform | None, ...] | None = None,
        tap: bool = False,
    ) -> Decoded:
        """Runs all layers.

        Args:
            x: input embeddings per branch.
            context: rows, columns, masks, phase.
            caches: per layer; None when the rows are all there is.
            transforms: one (or None) per branch; None for plain attention everywhere.
            tap: whether to return the attention weights of the last row.
        """
        transforms = transforms or (None,) * x.shape[0]
        rotations = Rotations.of(self.config, context)
        carries = tuple(transform.begin(context) if transform else () for transform in transforms)
        seen, taps = [], []
        for index, layer in enumerate(self.layers):
            edits = LayerEdits(transforms, carries, index, self.config.num_layers, tap)
            x, columns, carries, tapped = layer(x, context, rotations, caches and caches[index], edits)
            seen.append(columns)
            taps.append(tapped)
        return Decoded(self.norm(x), tuple(seen), carries, jnp.stack(taps) if tap else None)

    def head(self, hidden: Float[Array, "*T E"]) -> Float[Array, "*T V"]:
        """Next-token logits in float32."""
        if self.config.tie_word_embeddings:
            logits = self.embed_tokens.attend(hidden)
        else:
            logits = self.lm_head(hidden)
        return logits.astype(jnp.float32)
