"""Model configurations: frozen, hashable records read from a Hugging Face `config.json`.

Defaults that the file leaves out are those of the transformers configuration classes. A value that this
library cannot honour is an error that names it, never a silent default.
"""

import dataclasses
from typing import Any

from lvlm_jax.attention.rotary import RopeConfig
from lvlm_jax.errors import LVLMError

ACTIVATIONS = ("silu", "gelu", "quick_gelu", "gelu_pytorch_tanh", "relu")


@dataclasses.dataclass(frozen=True)
class DecoderTraits:
    """What sets one decoder family apart, besides sizes: one line per family in `DECODERS`."""

    attention_bias: bool | str  # on q, k, v; a string names the configuration field that says so
    output_bias: bool | str
    mlp_bias: bool | str = False
    qk_norm: bool = False


DECODERS: dict[str, DecoderTraits] = {
    "llama": DecoderTraits(
        attention_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"
    ),
    "mistral": DecoderTraits(attention_bias=False, output_bias=False),
    "qwen2": DecoderTraits(attention_bias=True, output_bias=False),
    "qwen3": DecoderTraits(attention_bias="attention_bias", output_bias="attention_bias", qk_norm=True),
    "internlm3": DecoderTraits(
        attention_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"
    ),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A LLaMA-like decoder. `sliding_window` holds one entry per layer: a width in tokens, or None."""

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

    def window(self, layer: int) -> int | None:
        """Width of the sliding window of a layer, None for full attention."""
        return self.sliding_window[layer] if self.sliding_window else None

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
            rope=_rope_from_hf(text),
            hidden_act=_activation("text_config.hidden_act", text.hidden_act),
            max_position_embeddings=text.max_position_embeddings,
            attention_bias=flag(traits.attention_bias),
            output_bias=flag(traits.output_bias),
            mlp_bias=flag(traits.mlp_bias),
            qk_norm=traits.qk_norm,
            tie_word_embeddings=bool(text.tie_word_embeddings),
            sliding_window=_sliding_window(text),
        )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision tower. Sizes in pixels."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_hf(cls, vision: Any) -> "VisionConfig":
        """Reads a transformers `CLIPVisionConfig`.

        Raises:
            LVLMError: unsupported `model_type` or activation.
        """
        if vision.model_type != "clip_vision_model":
            raise LVLMError(
                f"vision_config.model_type {vision.model_type!r} is not supported; expected 'clip_vision_model'"
            )
        if vision.num_channels != 3:
            raise LVLMError(f"vision_config.num_channels {vision.num_channels} is not supported; expected 3")
        return cls(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_layers=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            hidden_act=_activation("vision_config.hidden_act", vision.hidden_act),
            layer_norm_eps=vision.layer_norm_eps,
        )


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """LLaVA-1.5: CLIP tower, two-layer connector, LLaMA-like decoder.

    Attributes:
        feature_layers: indices into the tower's hidden states (0 is the embedding), concatenated over channels.
        feature_select: "default" drops the class token, "full" keeps it.
        eos_token_ids: tokens that end an answer.
        bos_token_id: what a prompt begins with; -1 for none.
        hf: the Hugging Face configuration as read, for writing it back; takes no part in equality.
    """

    text: DecoderConfig
    vision: VisionConfig
    image_token_id: int
    feature_layers: tuple[int, ...]
    feature_select: str
    projector_act: str
    projector_bias: bool
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    bos_token_id: int = -1
    model_type: str = "llava"
    hf: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def tokens_per_image(self) -> int:
        return self.vision.num_patches + (self.feature_select == "full")

    @classmethod
    def from_hf(cls, raw: dict, hf: Any) -> "LlavaConfig":
        """Reads a transformers `LlavaConfig` object; `raw` is the dict it came from.

        Raises:
            LVLMError: a part of the configuration is not supported.
        """
        layers = hf.vision_feature_layer
        layers = (layers,) if isinstance(layers, int) else tuple(layers)
        vision = VisionConfig.from_hf(hf.vision_config)
        for layer in layers:
            if not -vision.num_layers - 1 <= layer <= vision.num_layers:
                raise LVLMError(
                    f"vision_feature_layer {layer} is outside the tower's {vision.num_layers + 1} hidden states"
                )
        if hf.vision_feature_select_strategy not in ("default", "full"):
            raise LVLMError(
                f"vision_feature_select_strategy {hf.vision_feature_select_strategy!r} is not supported; "
                "expected 'default' or 'full'"
            )
        text = DecoderConfig.from_hf(hf.text_config)
        if hf.tie_word_embeddings != text.tie_word_embeddings:
            text = dataclasses.replace(text, tie_word_embeddings=bool(hf.tie_word_embeddings))
        eos = _first(getattr(hf, "eos_token_id", None), hf.text_config.eos_token_id, ())
        pad = _first(getattr(hf, "pad_token_id", None), hf.text_config.pad_token_id, 0)
        return cls(
            text=text,
            vision=vision,
            image_token_id=hf.image_token_index,
            feature_layers=layers,
            feature_select=hf.vision_feature_select_strategy,
            projector_act=_activation("projector_hidden_act", hf.projector_hidden_act),
            projector_bias=hf.multimodal_projector_bias,
            eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else (eos,),
            pad_token_id=pad,
            bos_token_id=_first(getattr(hf, "bos_token_id", None), hf.text_config.bos_token_id, -1),
            hf=raw,
        )


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _activation(field: str, name: str) -> str:
    if name not in ACTIVATIONS:
        raise LVLMError(f"{field} {name!r} is not supported; expected one of {', '.join(ACTIVATIONS)}")
    return name


def _sliding_window(text: Any) -> tuple[int | None, ...]:
    """Per-layer window widths; empty when every layer sees the whole context."""
    width = getattr(text, "sliding_window", None)
    if not width:
        return ()
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise LVLMError(f"text_config.layer_types entry {kind!r} is not supported")
    return tuple(width if kind == "sliding_attention" else None for kind in kinds)


def _rope_from_hf(text: Any) -> RopeConfig:
    given = dict(text.rope_parameters or {})
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise LVLMError("text_config.rope_parameters.partial_rotary_factor other than 1 is not supported")
    kind = given.pop("rope_type", given.pop("type", "default"))
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
    known = {ours: given[theirs] for theirs, ours in names.items() if given.get(theirs) is not None}
    known.setdefault("original_length", text.max_position_embeddings)
    return RopeConfig(kind=kind, **known)
