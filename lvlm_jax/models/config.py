"""Model configurations: frozen, hashable records read from a Hugging Face `config.json`.

If the file leaves a value out, the default of the transformers configuration class applies. An unsupported value is an
error that names it.
"""

import dataclasses
from typing import Any

from lvlm_jax.attention.rotary import RopeConfig
from lvlm_jax.errors import LVLMError

ACTIVATIONS = ("silu", "gelu", "quick_gelu", "gelu_pytorch_tanh", "relu")


@dataclasses.dataclass(frozen=True)
class DecoderTraits:
    """The features of a decoder family besides its sizes; one line per family in `DECODERS`."""

    attention_bias: bool | str  # whether q, k, v have one; a string names the configuration field
    output_bias: bool | str
    mlp_bias: bool | str = False
    qk_norm: bool = False
    output_norms: bool = False
    norm_offset: bool = False
    scaled_embedding: bool = False
    whole_images: bool = False
    window: bool = True  # whether transformers' code of the family reads `sliding_window`
    rope_pairs: bool = False
    rope_partial: bool = False  # whether only a share of each head may be rotated
    rope_sections: tuple[int, ...] = ()  # default `mrope_section` of multimodal positions
    rope_interleaved: bool = False


DECODERS: dict[str, DecoderTraits] = {
    "llama": DecoderTraits(
        attention_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias", window=False
    ),
    "mistral": DecoderTraits(attention_bias=False, output_bias=False),
    "qwen": DecoderTraits(
        attention_bias=True, output_bias="projection_bias", mlp_bias="projection_bias", rope_partial=True
    ),
    "qwen2": DecoderTraits(attention_bias=True, output_bias=False),
    "qwen3": DecoderTraits(attention_bias="attention_bias", output_bias="attention_bias", qk_norm=True),
    "internlm3": DecoderTraits(
        attention_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias", window=False
    ),
    "qwen2_vl_text": DecoderTraits(attention_bias=True, output_bias=False, rope_sections=(16, 24, 24)),
    "qwen2_5_vl_text": DecoderTraits(attention_bias=True, output_bias=False, rope_sections=(16, 24, 24)),
    "qwen3_vl_text": DecoderTraits(
        attention_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        window=False,
        rope_sections=(24, 20, 20),
        rope_interleaved=True,
    ),
    "glm4v_text": DecoderTraits(
        attention_bias=True,
        output_bias=False,
        output_norms=True,
        window=False,
        rope_pairs=True,
        rope_partial=True,
        rope_sections=(8, 12, 12),
    ),
    "gemma3_text": DecoderTraits(
        attention_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        output_norms=True,
        norm_offset=True,
        scaled_embedding=True,
        whole_images=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder.

    Attributes:
        local_rope: rotary positions of layers with a sliding window, if they differ.
        sliding_window: one entry per layer: a width in tokens, or None; empty for full attention everywhere.
        output_norms: outputs of attention and MLP are normalised before they are added to the residual stream.
        norm_offset: norms multiply by one plus their parameter.
        embedding_scale: factor on token embeddings; image tokens are not scaled.
        query_scale: factor on attention logits, if it is not head_dim ** -0.5.
        whole_images: image tokens also see later tokens of their image.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    hidden_act: str
    max_position_embeddings: int
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    sliding_window: tuple[int | None, ...] = ()
    local_rope: RopeConfig | None = None
    output_norms: bool = False
    norm_offset: bool = False
    embedding_scale: float = 1.0
    query_scale: float | None = None
    whole_images: bool = False

    def __post_init__(self):
        for rope in self.ropes:
            planes = int(self.head_dim * rope.share) // 2
            is_valid = rope.interleaved or sum(rope.sections) == planes
            if rope.sections and not (is_valid and len(rope.sections) == 3):
                raise LVLMError(
                    f"text_config.rope_parameters.mrope_section {list(rope.sections)} is not supported for heads of "
                    f"{2 * planes} rotating channels; expected three numbers that sum to {planes}"
                )

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The different rotary positions of its layers."""
        return (self.rope,) if self.local_rope is None else (self.rope, self.local_rope)

    def layer_rope(self, layer: int) -> RopeConfig:
        """The rotary positions of a layer."""
        return self.rope if self.local_rope is None or self.window(layer) is None else self.local_rope

    def window(self, layer: int) -> int | None:
        """Width of a layer's sliding window, None for full attention."""
        return self.sliding_window[layer] if self.sliding_window else None

    @property
    def large(self) -> bool:
        """Whether its layers have at least a billion parameters, so that a backward pass runs short of memory for
        activations."""
        mixing = 2 * self.head_dim * (self.num_heads + self.num_kv_heads)
        return self.num_layers * self.hidden_size * (mixing + 3 * self.intermediate_size) >= 1e9

    @classmethod
    def from_hf(cls, text: Any) -> "DecoderConfig":
        """Reads a transformers text configuration object.

        Raises:
            LVLMError: unsupported `model_type`, activation or rope scaling.
        """
        traits = DECODERS.get(text.model_type)
        if traits is None:
            raise LVLMError(
                f"text_config.model_type {text.model_type!r} is not supported; expected one of {', '.join(DECODERS)}"
            )

        def flag(value: bool | str) -> bool:
            return bool(getattr(text, value, False)) if isinstance(value, str) else value

        heads = text.num_attention_heads
        return cls(
            model_type=text.model_type,
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_layers=text.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            rms_norm_eps=text.rms_norm_eps,
            rope=_rope_from_hf(text, "full_attention", traits),
            local_rope=_local_rope(text, traits),
            hidden_act=activation_name(
                "text_config.hidden_act", getattr(text, "hidden_activation", None) or text.hidden_act
            ),
            max_position_embeddings=text.max_position_embeddings,
            attention_bias=flag(traits.attention_bias),
            output_bias=flag(traits.output_bias),
            mlp_bias=flag(traits.mlp_bias),
            qk_norm=traits.qk_norm,
            tie_word_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
            sliding_window=_sliding_window(text) if traits.window else (),
            output_norms=traits.output_norms,
            norm_offset=traits.norm_offset,
            embedding_scale=text.hidden_size**0.5 if traits.scaled_embedding else 1.0,
            query_scale=_query_scale(text),
            whole_images=traits.whole_images,
        )


def special_tokens(hf: Any) -> dict[str, Any]:
    """`eos_token_ids`, `pad_token_id` and `bos_token_id`, from a configuration or its `text_config`."""

    def field(name: str, default: Any) -> Any:
        return first_not_none(getattr(hf, name, None), getattr(hf.text_config, name, None), default)

    eos = field("eos_token_id", ())
    return {
        "eos_token_ids": tuple(eos) if isinstance(eos, list | tuple) else (eos,),
        "pad_token_id": field("pad_token_id", 0),
        "bos_token_id": field("bos_token_id", -1),
    }


def decoder_config(hf: Any) -> DecoderConfig:
    """The decoder of a composite configuration; embeddings may be tied in its text part or at its top."""
    text = DecoderConfig.from_hf(hf.text_config)
    return dataclasses.replace(text, tie_word_embeddings=bool(hf.tie_word_embeddings))


def first_not_none(*values: Any) -> Any:
    """The first value that is not None."""
    return next(value for value in values if value is not None)


def refuse_cut_heads(heads: int, hidden_size: int) -> None:
    """Checks the heads of a vision tower.

    Raises:
        LVLMError: they do not divide the channels.
    """
    if not isinstance(heads, int) or heads < 1 or hidden_size % heads:
        raise LVLMError(f"vision_config.num_attention_heads {heads} does not divide hidden_size {hidden_size}")


def activation_name(field: str, name: str) -> str:
    """Returns the name of an activation if it is supported.

    Raises:
        LVLMError: it is not.
    """
    if name not in ACTIVATIONS:
        raise LVLMError(f"{field} {name!r} is not supported; expected one of {', '.join(ACTIVATIONS)}")
    return name


def _sliding_window(text: Any) -> tuple[int | None, ...]:
    """The window width of each layer; empty if every layer sees the whole context."""
    width = getattr(text, "sliding_window", None)
    if not width:
        return ()
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise LVLMError(f"text_config.layer_types entry {kind!r} is not supported")
    return tuple(width if kind == "sliding_attention" else None for kind in kinds)


def _query_scale(text: Any) -> float | None:
    scalar = getattr(text, "query_pre_attn_scalar", None)
    return None if scalar is None else scalar**-0.5


def _local_rope(text: Any, traits: DecoderTraits) -> RopeConfig | None:
    own = "sliding_attention" in (text.rope_parameters or {})
    return _rope_from_hf(text, "sliding_attention", traits) if own else None


def _rope_from_hf(text: Any, layer_type: str, traits: DecoderTraits) -> RopeConfig:
    """The rotary positions for a type of layer, if the configuration distinguishes types."""
    parameters = dict(text.rope_parameters or {})
    parameters = dict(parameters.get(layer_type, parameters))
    kind = parameters.pop("rope_type", parameters.pop("type", "default"))
    names = {
        "rope_theta": "theta",
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
    }
    values = {ours: parameters[theirs] for theirs, ours in names.items() if parameters.get(theirs) is not None}
    values.setdefault("original_length", text.max_position_embeddings)
    values.setdefault("factor", text.max_position_embeddings / values["original_length"])
    return RopeConfig(
        kind="default" if kind == "mrope" else kind,
        # transformers' other decoders rotate whole heads, whatever the file says.
        share=parameters.get("partial_rotary_factor", 1.0) if traits.rope_partial else 1.0,
        pairs=traits.rope_pairs,
        sections=tuple(parameters.get("mrope_section") or traits.rope_sections),
        interleaved=bool(parameters.get("mrope_interleaved", traits.rope_interleaved)),
        **values,
    )
