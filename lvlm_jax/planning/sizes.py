"""Configurations of published models (the values of their config.json files), for plans without a checkpoint."""

from typing import Any

_CLIP_LARGE_336 = dict(
    model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
    num_attention_heads=16, image_size=336, patch_size=14, projection_dim=768,
)  # fmt: skip
_SIGLIP_SO400M_384 = dict(
    model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304, num_hidden_layers=26,
    num_attention_heads=16, image_size=384, patch_size=14, vision_use_head=False,
)  # fmt: skip


def _text(model_type: str, width: int, hidden: int, layers: int, heads: int, kv_heads: int, words: int) -> dict:
    return dict(
        model_type=model_type, hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=words, max_position_embeddings=32768,
    )  # fmt: skip


def _llava(text: dict[str, Any]) -> dict[str, Any]:
    return dict(model_type="llava", image_token_index=32000, vision_config=_CLIP_LARGE_336, text_config=text)


SIZES: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": _llava(
        _text("llama", 4096, 11008, 32, 32, 32, 32064) | {"max_position_embeddings": 4096}
    ),
    "llava-1.5-13b": _llava(
        _text("llama", 5120, 13824, 40, 40, 40, 32064) | {"max_position_embeddings": 4096}
    ),
    "llava-v1.6-34b": dict(
        model_type="llava_next", image_token_index=64000, vision_config=_CLIP_LARGE_336,
        text_config=_text("llama", 7168, 20480, 60, 56, 8, 64064),
    ),
    "llava-onevision-72b": dict(
        model_type="llava_onevision", image_token_index=151646, vision_config=_SIGLIP_SO400M_384,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
        text_config=_text("qwen2", 8192, 29568, 80, 64, 8, 152128),
    ),
}  # fmt: skip
SHORT = {name.rpartition("-")[2]: name for name in SIZES}  # such as "7b"
