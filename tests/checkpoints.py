"""Small random LLaVA checkpoints in Hugging Face format, and padded inputs for them.

The weights are drawn wide enough for peaked attention and spread-out logits: with the usual narrow
initialisation every softmax is nearly flat and a wrong position or mask would go unseen.
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE = "image"

# The models are tiny: threads would spend their time waiting for one another.
torch.set_num_threads(1)

_TINY = json.loads((Path(__file__).parent / "models" / "families" / "llava.json").read_text())
VARIETIES = _TINY["varieties"]  # name -> overrides of `llava_config`; together they cover what decoders differ by
# There is no end-of-sequence token, so that greedy runs keep their full length.
TOKENS = dict(pad_token_id=0, bos_token_id=None, eos_token_id=None)
TEXT = dict(vocab_size=120, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
TEXT |= dict(num_key_value_heads=2, max_position_embeddings=512) | TOKENS
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


def llava_config(text=None, vision=None, **overrides):
    """A tiny LlavaConfig; `text` and `vision` override single fields of its two parts."""
    text = TEXT | _TINY["text"] | (text or {})
    vision = VISION | _TINY["vision"] | (vision or {})
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    full = overrides.get("vision_feature_select_strategy") == "full"
    fields = dict(image_token_index=text["vocab_size"] - 1, image_seq_length=patches + full) | TOKENS
    return LlavaConfig(
        text_config=AutoConfig.for_model(**text), vision_config=AutoConfig.for_model(**vision), **fields | overrides
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
    inputs, size = padded(rows), config.vision_config.image_size
    if images:
        inputs["pixel_values"] = generator.normal(size=(images, 3, size, size)).astype(np.float32)
    return inputs


def padded(rows):
    """Left-padded `input_ids` and `attention_mask` of rows of tokens."""
    length = max(map(len, rows))
    return {
        "input_ids": np.stack([np.pad(row, (length - len(row), 0)) for row in rows]).astype(np.int64),
        "attention_mask": np.stack([np.arange(length) >= length - len(row) for row in rows]).astype(np.int64),
    }


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
