"""Small random Qwen2-VL and Qwen2.5-VL checkpoints in Hugging Face format, and processors for them."""

import json

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from tests import checkpoints, small

VOCABULARY = 120
CLASSES = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
}
TOWERS = {
    "qwen2_vl": {"embed_dim": 32, "mlp_ratio": 2, "depth": 2},
    # Windows of 2 x 2 tokens in the first and last layer.
    "qwen2_5_vl": {
        "hidden_size": 32,
        "intermediate_size": 40,
        "depth": 3,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    },
}
OUTPUT_WIDTH = {"qwen2_vl": "hidden_size", "qwen2_5_vl": "out_hidden_size"}


def tiny_config(model_type, text=None, vision=None, **overrides):
    """A tiny configuration; `text` and `vision` override single fields of its two parts.

    There is no end-of-sequence token, so that greedy runs keep their full length.
    """
    text_fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        **(text or {}),
    }
    vision_fields = {
        **TOWERS[model_type],
        OUTPUT_WIDTH[model_type]: text_fields["hidden_size"],
        "num_heads": 2,
        "patch_size": 4,
        **(vision or {}),
    }
    return CLASSES[model_type][0](
        text_config=text_fields,
        vision_config=vision_fields,
        **{
            "vision_start_token_id": VOCABULARY - 4,
            "vision_end_token_id": VOCABULARY - 3,
            "image_token_id": VOCABULARY - 2,
            "video_token_id": VOCABULARY - 1,
            **overrides,
        },
    )


def make(folder, model_type, seed, **overrides):
    """Save a random checkpoint in `folder` (skipped when None) and return the torch model, in float32.

    `overrides` are those of `tiny_config`; attention is the explicit (eager) one.
    """
    config = tiny_config(model_type, **overrides)
    config._attn_implementation = "eager"
    model = CLASSES[model_type][1](config).float().eval()
    checkpoints.randomize(model, seed)
    if folder is not None:
        model.save_pretrained(folder)
    return model


SPECIALS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def write_processor(folder, processor_class):
    """The files of a processor as the Qwen repositories have them, over a tokenizer of bytes.

    Returns the tokenizer, whose last four words are `SPECIALS`.
    """
    tokenizer = small.build_processor().tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIALS)})
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("image_token", "chat_template", "processor_class"):
        settings.pop(name, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": processor_class,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 8 * 8 * 4,
        "max_pixels": 8 * 8 * 16,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return tokenizer
