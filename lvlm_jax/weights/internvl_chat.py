"""Converts OpenGVLab's own checkpoint layout (`model_type` internvl_chat) to a normal InternVL configuration.

The models are those of the "-hf" repositories under other names; `weights/internvl.py` has the names of both. Their
configuration differs in four ways:

- the tower's fields have other names and defaults;
- the decoder may be an InternLM2 or InternLM3, for which transformers has no code and needs none: both compute the same
  as LLaMA, apart from bias flags;
- only the tokenizer defines the image token, and answers end with the chat format's own token, whatever the decoder's
  configuration says;
- the configuration also defines how images are split into tiles and how prompts are written; the new configuration
  keeps these fields, under their old names.
"""

from pathlib import Path
from typing import Any

from lvlm_jax.errors import LVLMError
from lvlm_jax.weights.checkpoint import read_optional

MODEL_TYPE = "internvl_chat"

IMAGE_TOKEN = "<IMG_CONTEXT>"
END_TOKEN = "<|im_end|>"
# For folders without a tokenizer: the image token's id in all checkpoints with these decoders.
_IMAGE_TOKEN_IDS = {"InternLM2ForCausalLM": 92546, "Qwen2ForCausalLM": 151667}

_DECODERS = {
    "InternLM2ForCausalLM": "llama",
    "InternLM3ForCausalLM": "llama",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_DECODER_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_dropout",
    "attention_bias",
    "mlp_bias",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "torch_dtype",
    "dtype",
)

# Their name for a field of the tower -> (transformers' name, their default).
_TOWER_FIELDS = {
    "hidden_size": ("hidden_size", 3200),
    "intermediate_size": ("intermediate_size", 12800),
    "num_hidden_layers": ("num_hidden_layers", 48),
    "num_attention_heads": ("num_attention_heads", 25),
    "num_channels": ("num_channels", 3),
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 14),
    "hidden_act": ("hidden_act", "gelu"),
    "norm_type": ("norm_type", "rms_norm"),
    "layer_norm_eps": ("layer_norm_eps", 1e-6),
    "qkv_bias": ("attention_bias", False),
    "qk_normalization": ("use_qk_norm", True),
    "dropout": ("hidden_dropout_prob", 0.0),
    "attention_dropout": ("attention_dropout", 0.0),
    "initializer_range": ("initializer_range", 0.02),
    "initializer_factor": ("layer_scale_init_value", 0.1),
}


def to_hf_config(folder: Path, config: dict) -> dict:
    """The `InternVLConfig` dict of transformers for a configuration of OpenGVLab.

    Args:
        folder: the checkpoint's folder, for its tokenizer files.
        config: its `config.json`.

    Raises:
        LVLMError: a value is not supported, or there is no image token.
    """
    decoder = config.get("llm_config") or {}
    kind = (decoder.get("architectures") or [None])[0]
    if kind not in _DECODERS:
        raise LVLMError(
            f"llm_config.architectures {kind!r} of {folder} is not supported; expected one of {', '.join(_DECODERS)}"
        )
    _check(folder, config)
    text, vision = _text_config(folder, decoder, kind), _vision_config(folder, config)
    ratio, side = config.get("downsample_ratio", 0.5), vision["image_size"] // vision["patch_size"]
    image_token = token_id(folder, IMAGE_TOKEN)
    if image_token is None:
        image_token = _IMAGE_TOKEN_IDS.get(kind)
    if image_token is None or image_token >= text["vocab_size"]:
        raise LVLMError(
            f"the tokenizer files of {folder} have no {IMAGE_TOKEN}; copy added_tokens.json or tokenizer.json from "
            "the checkpoint's repository"
        )
    hf = {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "text_config": text,
        "vision_config": vision,
        "image_token_id": image_token,
        "image_seq_length": round((side * ratio) ** 2),
        "downsample_ratio": ratio,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.get("select_layer", -1),
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": text["tie_word_embeddings"],
        "template": config.get("template"),
        "min_dynamic_patch": config.get("min_dynamic_patch", 1),
        "max_dynamic_patch": config.get("max_dynamic_patch", 6) if config.get("dynamic_image_size") else 1,
    }
    return hf | {key: config[key] for key in ("torch_dtype", "dtype") if key in config}


def _check(folder: Path, config: dict) -> None:
    """Raises an `LVLMError` for options that transformers' InternVL does not support."""
    side = (config.get("vision_config") or {}).get("image_size", 224)
    # field -> (its value, the allowed values)
    required: dict[str, tuple[Any, tuple]] = {
        "ps_version": (config.get("ps_version", "v1"), ("v2",)),  # v1 transposes the map of patches
        "force_image_size": (config.get("force_image_size") or side, (side,)),
        "use_backbone_lora": (config.get("use_backbone_lora") or 0, (0,)),
        "use_llm_lora": (config.get("use_llm_lora") or 0, (0,)),
        "pad2square": (bool(config.get("pad2square")), (False,)),
    }
    if config.get("dynamic_image_size") and config.get("max_dynamic_patch", 6) > 1:
        required["use_thumbnail"] = (bool(config.get("use_thumbnail")), (True,))
    for name, (value, allowed) in required.items():
        if value not in allowed:
            raise LVLMError(f"{name} {value!r} of {folder} is not supported; expected {allowed[0]!r}")


def _text_config(folder: Path, decoder: dict, kind: str) -> dict:
    """The decoder as a configuration for transformers."""
    text = {name: decoder[name] for name in _DECODER_FIELDS if decoder.get(name) is not None}
    # Defaults of their configuration classes that differ from transformers'.
    if kind == "InternLM2ForCausalLM":
        version = decoder.get("rope_pos_id_version", "default")
        if version != "default":
            raise LVLMError(
                f"llm_config.rope_pos_id_version {version!r} of {folder} is not supported; expected 'default'"
            )
        text = {"vocab_size": 103168, **text, "attention_bias": bool(decoder.get("bias", True))}
    elif kind == "InternLM3ForCausalLM":
        biases = bool(decoder.get("qkv_bias", False)), bool(decoder.get("bias", False))
        if biases[0] != biases[1]:
            raise LVLMError(
                f"llm_config of {folder} has qkv_bias {biases[0]} and bias {biases[1]}; only equal ones are supported"
            )
        text |= {"attention_bias": biases[0], "mlp_bias": biases[1]}
    for name in ("rope_scaling", "rope_parameters"):
        if name in text and "rope_type" not in text[name]:
            text[name] = text[name] | {"rope_type": text[name].get("type", "default")}
    end = token_id(folder, END_TOKEN)
    if end is not None:
        text["eos_token_id"] = end
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [name for name in required if name not in text]
    if missing:
        raise LVLMError(f"llm_config of {folder} lacks {', '.join(missing)}")
    tied = bool(decoder.get("tie_word_embeddings", False))
    return text | {"model_type": _DECODERS[kind], "tie_word_embeddings": tied}


def _vision_config(folder: Path, config: dict) -> dict:
    """The tower's configuration under transformers' names."""
    tower = config.get("vision_config") or {}
    kind = tower.get("model_type", "intern_vit_6b")
    if kind != "intern_vit_6b":
        raise LVLMError(f"vision_config.model_type {kind!r} of {folder} is not supported; expected 'intern_vit_6b'")
    vision = {name: tower.get(theirs, default) for theirs, (name, default) in _TOWER_FIELDS.items()}
    if vision["use_qk_norm"] and vision["layer_norm_eps"] != 1e-6:
        raise LVLMError(
            f"vision_config.layer_norm_eps {vision['layer_norm_eps']} of {folder} is not supported; expected 1e-06, "
            "the epsilon of the norms of queries and keys"
        )
    return vision | {
        "model_type": "internvl_vision",
        "architectures": ["InternVLVisionModel"],
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,  # transformers' name for a tower without a final norm
    }


def token_id(folder: Path, token: str) -> int | None:
    """The id of an added token in a folder's tokenizer files; None if they do not contain it."""
    added = read_optional(folder, "added_tokens.json")
    if token in added:
        return int(added[token])
    added_tokens = read_optional(folder, "tokenizer_config.json").get("added_tokens_decoder", {})
    for number, entry in added_tokens.items():
        if entry.get("content") == token:
            return int(number)
    entries = read_optional(folder, "tokenizer.json").get("added_tokens", [])
    return next((int(entry["id"]) for entry in entries if entry.get("content") == token), None)
