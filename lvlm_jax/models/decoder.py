"""The decoder: LLaMA, Vicuna, Mistral, InternLM, Qwen, GLM and Gemma differ only in their configuration.

Hidden states have a leading branch axis, `Float[Array, "N B T E"]`, so that one pass over the weights serves greedy
decoding (N = 1) and a contrastive method (N = 2).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lvlm_jax.attention.attend import LayerEdits, attend
from lvlm_jax.attention.cache import Block, LayerCache
from lvlm_jax.attention.context import Context
from lvlm_jax.attention.layered import at_layer
from lvlm_jax.attention.rotary import RopeConfig, Rotation, rotate
from lvlm_jax.attention.tap import Tap, Tapped
from lvlm_jax.attention.transform import Stream, Transform, overrides
from lvlm_jax.models.config import DecoderConfig
from lvlm_jax.models.layers import Embed, activation, linear, rms_norm, tied_head


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotations:
    """The rotations that all layers of a kind share in one forward pass: of the rows, and of `Context.image_shift`."""

    rows: Rotation
    shift: Rotation | None

    @classmethod
    def of(cls, rope: RopeConfig, head_dim: int, contexts: tuple[Context, ...]) -> "Rotations":
        """The rotations of all branches; with a leading branch axis if their positions differ."""
        positions, shift = contexts[0].positions, contexts[0].image_shift
        if any(context is not contexts[0] for context in contexts):
            positions = jnp.stack([context.positions for context in contexts])
        rows = Rotation.of(rope, head_dim, positions, contexts[0].axes, rope.scale())
        return cls(rows.heads(axis=positions.ndim - 1), shift_rotation(rope, head_dim, shift))


def shift_rotation(rope: RopeConfig, head_dim: int, shift: Float[Array, "*A B S"] | None) -> Rotation | None:
    """The rotation of `Context.image_shift`."""
    if shift is None:
        return None
    return Rotation.of(rope, head_dim, shift, shift if shift.ndim == 3 else None)


class DecoderOutput(NamedTuple):
    """The result of one pass through the decoder.

    Attributes:
        hidden: final normalised hidden states.
        columns: per layer, the columns that rows see: fresh ones in prefill, the updated caches in decode.
        carries: the last carry of each branch.
        tapped: the tapped arrays; exits are still hidden states.
    """

    hidden: Float[Array, "N B T E"]
    columns: tuple[LayerCache, ...]
    carries: tuple
    tapped: Tapped


class DecoderAttention(nn.Module):
    """Projections, rotary positions and cache of one layer around `attention.attend`."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "N B T E"],
        contexts: tuple[Context, ...],
        rotations: Rotations,
        cache: LayerCache | None,
        edits: LayerEdits,
    ) -> tuple[Float[Array, "N B T E"], LayerCache, tuple, Float[Array, "M B G R S"] | None]:
        config = self.config

        def project(name: str, heads: int, norm: str | None = None) -> Float[Array, "N B H T D"]:
            flat = linear(heads * config.head_dim, self.dtype, name, use_bias=config.attention_bias)(x)
            split = flat.reshape(*x.shape[:3], heads, config.head_dim)
            if norm and config.qk_norm:
                split = rms_norm(config.rms_norm_eps, self.dtype, norm, config.norm_offset)(split)
            return split.swapaxes(2, 3)

        query = project("q_proj", config.num_heads, "q_norm")
        if config.query_scale is not None:  # `attend` divides by the root of head_dim
            query = query * (config.query_scale * config.head_dim**0.5)
        key = rotate(project("k_proj", config.num_kv_heads, "k_norm"), rotations.rows)
        value = project("v_proj", config.num_kv_heads)
        columns = _columns(cache, key, value, contexts)
        o_proj = linear(config.hidden_size, self.dtype, "o_proj", use_bias=config.output_bias)

        def output(heads: Float[Array, "*N B H T D"]) -> Float[Array, "*N B T E"]:
            flat = heads.swapaxes(-3, -2)
            return o_proj(flat.reshape(*flat.shape[:-2], -1).astype(self.dtype))

        mixed, carries, tapped = attend(
            tuple(rotate(query, rotations.rows)),
            columns,
            contexts,
            rotations.shift,
            dataclasses.replace(edits, project=output),
            config.window(edits.layer),
            config.whole_images,
        )
        return output(jnp.stack(mixed)), columns, carries, tapped


def _columns(cache: LayerCache | None, key: jax.Array, value: jax.Array, contexts: tuple[Context, ...]) -> LayerCache:
    """The columns that rows see: in prefill the prefix and their own fresh columns, else the updated caches."""
    fresh = tuple(Block(k, v) for k, v in zip(key, value, strict=True))
    if cache is None:
        return LayerCache(None, fresh)
    if contexts[0].phase == "prefill" and not cache.own:
        return LayerCache(cache.prefix, fresh)
    start = cache.prefix.length if cache.prefix else 0
    own = zip(cache.own, fresh, contexts, strict=True)
    return LayerCache(cache.prefix, tuple(block.write(new, context.first_row - start) for block, new, context in own))


def _any_overrides(stage: str, transforms: tuple[Transform | None, ...]) -> bool:
    """Whether any branch overrides a stage outside attention."""
    return any(transform is not None and overrides(transform, stage) for transform in transforms)


def _edit_branches(
    edit: Callable[[int, Transform], jax.Array], x: Float[Array, "N B T E"], transforms: tuple[Transform | None, ...]
) -> Float[Array, "N B T E"]:
    """Replaces `x` by `edit(branch, transform)` for every branch that has a transform."""
    edited = [x[i] if transform is None else edit(i, transform) for i, transform in enumerate(transforms)]
    return jnp.stack(edited).astype(x.dtype)


def _residual_stage(
    layer: int, num_layers: int, phase: str, x: Float[Array, "N B T E"], branch: int, transform: Transform
) -> Float[Array, "B T E"]:
    """The stage "residual" of one branch."""
    return transform.residual(layer, num_layers, phase, x[branch])


class DecoderMlp(nn.Module):
    """Gated MLP: down(act(gate(x)) · up(x))."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*N B T E"]) -> Float[Array, "*N B T E"]:
        config = self.config

        def project(features: int, name: str) -> nn.Dense:
            return linear(features, self.dtype, name, use_bias=config.mlp_bias)

        gate = activation(config.hidden_act)(project(config.intermediate_size, "gate_proj")(x))
        return project(config.hidden_size, "down_proj")(gate * project(config.intermediate_size, "up_proj")(x))


class DecoderLayer(nn.Module):
    """Attention and MLP, each after its norm and added to the residual stream."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, contexts, rotations, cache, edits):
        config = self.config

        def norm(name: str) -> nn.Module:
            return rms_norm(config.rms_norm_eps, self.dtype, name, config.norm_offset)

        input_norm, mlp_norm = norm("input_layernorm"), norm("post_attention_layernorm")
        mlp = DecoderMlp(config, self.dtype, name="mlp")
        output_norm = norm("mlp_output_norm") if config.output_norms else lambda added: added
        entered, transforms, carries = x, edits.transforms, edits.carries

        def stream(branch: int, read: Float[Array, "B T E"] | None) -> Stream:
            return Stream(
                layer=edits.layer,
                num_layers=edits.num_layers,
                phase=contexts[0].phase,
                layer_input=entered[branch],
                mlp_input=read,
                carry=carries[branch],
                input_norm=input_norm,
                mlp_norm=mlp_norm,
                feed_forward=lambda hidden: output_norm(mlp(hidden)),
                exit_logits=edits.exit_logits,
            )

        if _any_overrides("enter", transforms):
            carries = tuple(
                transform.enter(stream(i, None)) if transform else carries[i] for i, transform in enumerate(transforms)
            )
            edits = dataclasses.replace(edits, carries=carries)
        mixed, columns, carries, tapped = DecoderAttention(self.config, self.dtype, name="self_attn")(
            input_norm(x), contexts, rotations, cache, edits
        )
        x = x + (norm("attention_output_norm")(mixed) if config.output_norms else mixed)
        normed = mlp_norm(x)
        mixed = output_norm(mlp(normed))
        if _any_overrides("mlp", transforms):
            mixed = _edit_branches(
                lambda i, transform: transform.mlp(stream(i, normed[i]), mixed[i]), mixed, transforms
            )
        return x + mixed, columns, carries, tapped


class Decoder(nn.Module):
    """Maps tokens to embeddings, embeddings to hidden states, and hidden states to logits.

    Attributes:
        config: sizes and switches.
        dtype: compute dtype; norms, angles and softmax are float32 regardless.
        remat: recompute each layer in the backward pass instead of keeping its activations.
    """

    config: DecoderConfig
    dtype: jnp.dtype
    remat: bool = False

    def setup(self):
        config = self.config
        initializer = nn.initializers.normal(0.02)
        self.embed_tokens = Embed(config.vocab_size, config.hidden_size, dtype=self.dtype, embedding_init=initializer)
        layer = nn.remat(DecoderLayer) if self.remat else DecoderLayer
        self.layers = [layer(config, self.dtype) for _ in range(config.num_layers)]
        self.norm = rms_norm(config.rms_norm_eps, self.dtype, None, config.norm_offset)
        if not config.tie_word_embeddings:
            self.lm_head = linear(config.vocab_size, self.dtype, None)

    def embed(self, tokens: Int[Array, "*T"]) -> Float[Array, "*T E"]:
        # XLA turns the lookup of a single token into a slice, for which it gathers a table that is sharded over
        # devices.
        alone = tokens.size == 1
        embedded = self.embed_tokens(jnp.repeat(tokens, 2, axis=0))[:1] if alone else self.embed_tokens(tokens)
        scale = self.config.embedding_scale
        return embedded if scale == 1 else embedded * jnp.asarray(scale, embedded.dtype)

    def __call__(
        self,
        x: Float[Array, "N B T E"],
        contexts: Context | tuple[Context, ...],
        caches: tuple[LayerCache, ...] | None = None,
        transforms: tuple[Transform | None, ...] | None = None,
        tap: Tap | None = None,
    ) -> DecoderOutput:
        """Runs all layers.

        Args:
            x: input embeddings per branch. With deepstack layers, a prompt has E (1 + layers) channels; the k-th
                further E channels are added to the residual stream after layer k - 1.
            contexts: rows, columns, masks, phase; one per branch, or one for all.
            caches: per layer; None if the rows see only each other.
            transforms: one (or None) per branch; None for plain attention everywhere.
            tap: what else to return.
        """
        transforms = transforms or (None,) * x.shape[0]
        contexts = (contexts,) * x.shape[0] if isinstance(contexts, Context) else contexts
        config = self.config
        rotations = {rope: Rotations.of(rope, config.head_dim, contexts) for rope in config.ropes}
        x, *added = jnp.split(x, x.shape[-1] // config.hidden_size, axis=-1)
        carries = tuple(
            transform.begin(context, embeddings) if transform else ()
            for transform, context, embeddings in zip(transforms, contexts, x, strict=True)
        )
        depth = config.num_layers
        tap = tap or Tap()
        all_columns, weights, streams = [], [], [x]
        for index, layer in enumerate(self.layers):
            layer_transforms = at_layer(transforms, index, depth)
            edits = LayerEdits(
                layer_transforms, carries, index, depth, tap, functools.partial(self.exit_logits, norm=True)
            )
            rotation = rotations[config.layer_rope(index)]
            x, columns, carries, tapped = layer(x, contexts, rotation, caches and caches[index], edits)
            x = x + added[index] if index < len(added) else x
            if _any_overrides("residual", layer_transforms):
                edit = functools.partial(_residual_stage, index, depth, contexts[0].phase, x)
                x = _edit_branches(edit, x, layer_transforms)
            all_columns.append(columns)
            weights += [tapped] if tap.wants(index) else []
            streams.append(x)
        rows = slice(None) if tap.rows == "all" else slice(-1, None)
        tapped = Tapped(
            attention=jnp.stack(weights) if weights else None,
            hidden=jnp.stack([streams[i][:, :, rows] for i in tap.hidden]) if tap.hidden else None,
            exits=jnp.stack([streams[i][:, :, -1] for i in tap.exits]) if tap.exits else None,
        )
        return DecoderOutput(self.norm(x), tuple(all_columns), carries, tapped)

    def exit_logits(self, hidden: Float[Array, "*T E"], norm: bool) -> Float[Array, "*T V"]:
        """Logits of a hidden state inside the stack, with or without the final norm."""
        return self.head(self.norm(hidden) if norm else hidden)

    def head_with_exits(
        self, last: Float[Array, "N *T E"], exits: Float[Array, "X *T E"], norm: bool
    ) -> tuple[Float[Array, "N *T V"], Float[Array, "X *T V"]]:
        """Logits of final hidden states, and of early exits as in `exit_logits`; the head's matrix is read once."""
        logits = self.head(jnp.concatenate([last, self.norm(exits) if norm else exits]))
        return logits[: len(last)], logits[len(last) :]

    def head(self, hidden: Float[Array, "*T E"]) -> Float[Array, "*T V"]:
        """Next-token logits in float32."""
        if self.config.tie_word_embeddings:
            logits = tied_head(hidden.astype(self.dtype), self.embed_tokens.embedding)
        else:
            logits = self.lm_head(hidden)
        return logits.astype(jnp.float32)
