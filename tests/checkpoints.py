"""Small random LLaVA checkpoints in Hugging Face format, and padded inputs for them.

The weights are drawn wide enough for peaked attention and spread-out logits: with the usual narrow
initialisation every softmax is nearly flat and a wrong position or mask would go unseen.
"""

import numpy as np
import torch
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE = "image"

# The models are tiny: threads would spend their time waiting for one another.
torch.set_num_threads(1)

# Name -> overrides of `llava_config`. Together they cover what the families differ by.
VARIETIES = {
    "llama": {},
    "llama_gqa_all_biases": {
        "text": {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
        "vision": {"image_size": 20, "patch_size": 5, "hidden_act": "gelu"},
        "multimodal_projector_bias": False,
    },
    "qwen2_tied_two_feature_layers": {
        "text": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
        "vision": {"image_size": 24, "patch_size": 8},
        "vision_feature_layer": [-2, -1],
    },
    "qwen3_full_selection": {
        "text": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16},
        "vision": {"image_size": 24, "patch_size": 8},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    "mistral_window": {
        "text": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 14},
        "vision": {"image_size": 24, "patch_size": 8},
        "vision_feature_layer": [0, 2],
    },
    "linear_rope": {
        "text": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}}
    },
    "llama3_rope": {
        "text": {
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        }
    },
    "yarn_rope": {
        "text": {
            "model_type": "qwen2",
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        }
    },
}


def llava_config(text=None, vision=None, **overrides):
    """A tiny LlavaConfig; `text` and `vision` override single fields of its two parts.

    There is no end-of-sequence token, so that greedy runs keep their full length.
    """
    text_fields = {
        "model_type": "llama",
        "vocab_size": 120,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        **(text or {}),
    }
    vision_fields = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 7,
        "projection_dim": 16,
        **(vision or {}),
    }
    patches = (vision_fields["image_size"] // vision_fields["patch_size"]) ** 2
    full = overrides.get("vision_feature_select_strategy") == "full"
    return LlavaConfig(
        text_config=AutoConfig.for_model(**text_fields),
        vision_config=AutoConfig.for_model(**vision_fields),
        **{
            "image_token_index": text_fields["vocab_size"] - 1,
            "image_seq_length": patches + full,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": None,
            **overrides,
        },
    )


def randomize(model, seed):
    """Redraw every parameter of a LLaVA model in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter.shape[1:].numel()
        if name.endswith("language_model.norm.weight"):
            # Of either sign: with tied embeddings a token would otherwise mostly predict itself.
            values = values.sign()
        elif "norm" in name:
            values = 0.1 * values + float(name.endswith("weight"))
        elif name.endswith("bias"):
            values = 0.2 * values
        elif "q_proj" in name or "k_proj" in name:
            values = values * 1.4 / fan_in**0.5  # attention logits of standard deviation near 2
        elif "embed_tokens" in name:
            values = 0.4 * values  # also the head where embeddings are tied
        elif "lm_head" in name:
            values = values * 2.5 / fan_in**0.5
        elif "embedding" in name:
            values = 0.5 * values
        else:
            values = values / fan_in**0.5
        parameter.data.copy_(values)


def make_llava(folder, seed, **overrides):
    """Save a random LLaVA checkpoint in `folder` (skipped when None) and return the torch model, in float32.

    `overrides` are those of `llava_config`; attention is the explicit (eager) one.
    """
    config = llava_config(**overrides)
    config._attn_implementation = "eager"
    model = LlavaForConditionalGeneration(config).float().eval()
    randomize(model, seed)
    if folder is not None:
        model.save_pretrained(folder)
    return model


def random_inputs(config, seed, layouts):
    """Left-padded arrays for a batch whose prompts are drawn at random.

    Args:
        config: the LlavaConfig of the model.
        seed: seed of tokens and pixels.
        layouts: one tuple per sample; an integer stands for that many text tokens, IMAGE for one image.

    Returns a dict of NumPy arrays: input_ids, attention_mask [B, S], and pixel_values [images, 3, h, w], the
    images of all samples in reading order (absent when no sample has one).
    """
    generator = np.random.default_rng(seed)
    rows, images = [], 0
    for layout in layouts:
        parts = []
        for part in layout:
            if part == IMAGE:
                images += 1
                parts.append(np.full(config.image_seq_length, config.image_token_index))
            else:
                parts.append(generator.integers(3, config.text_config.vocab_size - 1, part))
        rows.append(np.concatenate(parts))
    length = max(map(len, rows))
    size = config.vision_config.image_size
    inputs = {
        "input_ids": np.stack([np.pad(row, (length - len(row), 0)) for row in rows]).astype(np.int64),
        "attention_mask": np.stack([np.arange(length) >= length - len(row) for row in rows]).astype(np.int64),
    }
    if images:
        inputs["pixel_values"] = generator.normal(size=(images, 3, size, size)).astype(np.float32)
    return inputs


def select(config, inputs, row):
    """The arrays of one sample of `random_inputs`, as a batch of one without padding."""
    valid = inputs["attention_mask"].astype(bool)
    ids = inputs["input_ids"][row, valid[row]]
    sample = {"input_ids": ids[None], "attention_mask": np.ones_like(ids)[None]}
    counts = (inputs["input_ids"] == config.image_token_index).sum(1) // config.image_seq_length
    if counts[row]:
        first = counts[:row].sum()
        sample["pixel_values"] = inputs["pixel_values"][first : first + counts[row]]
    return sample


def to_torch(inputs):
    """The same arrays as torch tensors, ready for `model(**...)`."""
    return {name: torch.from_numpy(array) for name, array in inputs.items()}
