"""Qwen-VL checkpoints as the authors publish them: names and shapes, small random ones, inputs for them."""

import json

import numpy as np
import torch
from safetensors.torch import save_file

IMAGE = "image"

torch.set_num_threads(1)

# `config.json` of Qwen/Qwen-VL-Chat; Qwen/Qwen-VL differs in nothing that says how the model computes.
PUBLISHED = {
    "architectures": ["QWenLMHeadModel"],
    "attn_dropout_prob": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": True,
    "fp32": False,
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 8192,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer",
    "torch_dtype": "float16",
    "transformers_version": "4.32.0",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "visual": {
        "heads": 16,
        "image_size": 448,
        "image_start_id": 151857,
        "layers": 48,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    },
    "vocab_size": 151936,
}

_SMALL = {
    **PUBLISHED,
    "torch_dtype": "float32",
    "hidden_size": 128,
    "intermediate_size": 160,
    "kv_channels": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 480,
}

# Name -> config.json. Between them every switch has both values, and every grid of positions is of another size and
# of the same size as what it is added to.
VARIETIES = {
    "published_switches": {
        **_SMALL,
        "visual": {
            "heads": 4,
            "image_size": 40,
            "image_start_id": 470,
            "layers": 2,
            "mlp_ratio": 2.51,
            "n_queries": 16,
            "output_dim": 128,
            "patch_size": 2,
            "width": 32,
        },
    },
    "other_switches": {
        **_SMALL,
        "hidden_size": 256,
        "kv_channels": 64,
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 1024,
        "no_bias": False,
        "rotary_emb_base": 500,
        "rotary_pct": 0.5,
        "tie_word_embeddings": True,
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
        "visual": {
            "heads": 8,
            "image_size": 64,
            "image_start_id": 470,
            "layers": 1,
            "mlp_ratio": 1.5,
            "output_dim": 256,
            "patch_size": 4,
            "width": 256,
        },
    },
}


def tensor_shapes(config):
    """Published tensor name -> shape of a config.json, written out from the published modules."""
    width, mlp, bias = config["hidden_size"], config["intermediate_size"] // 2, not config["no_bias"]
    shapes = {"transformer.wte.weight": (config["vocab_size"], width), "transformer.ln_f.weight": (width,)}

    def linear(name, inputs, outputs, has_bias):
        shapes[f"{name}.weight"] = (outputs, inputs)
        if has_bias:
            shapes[f"{name}.bias"] = (outputs,)

    def layer_norm(name, size):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    for index in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{index}"
        shapes[f"{layer}.ln_1.weight"] = shapes[f"{layer}.ln_2.weight"] = (width,)
        linear(f"{layer}.attn.c_attn", width, 3 * width, True)
        linear(f"{layer}.attn.c_proj", width, width, bias)
        linear(f"{layer}.mlp.w1", width, mlp, bias)
        linear(f"{layer}.mlp.w2", width, mlp, bias)
        linear(f"{layer}.mlp.c_proj", mlp, width, bias)
    visual, tower = config["visual"], "transformer.visual"
    size, patch, queries = visual["width"], visual["patch_size"], visual.get("n_queries", 256)
    shapes[f"{tower}.conv1.weight"] = (size, 3, patch, patch)
    shapes[f"{tower}.positional_embedding"] = (256, size)
    layer_norm(f"{tower}.ln_pre", size)
    for index in range(visual["layers"]):
        block = f"{tower}.transformer.resblocks.{index}"
        layer_norm(f"{block}.ln_1", size)
        layer_norm(f"{block}.ln_2", size)
        linear(f"{block}.attn.in_proj", size, 3 * size, True)
        linear(f"{block}.attn.out_proj", size, size, True)
        linear(f"{block}.mlp.c_fc", size, int(size * visual["mlp_ratio"]), True)
        linear(f"{block}.mlp.c_proj", int(size * visual["mlp_ratio"]), size, True)
    pool, output = f"{tower}.attn_pool", visual["output_dim"]
    shapes[f"{pool}.pos_embed"] = shapes[f"{pool}.query"] = (queries, output)
    if size != output:
        linear(f"{pool}.kv_proj", size, output, False)
    shapes[f"{pool}.attn.in_proj_weight"] = (3 * output, output)
    shapes[f"{pool}.attn.in_proj_bias"] = (3 * output,)
    linear(f"{pool}.attn.out_proj", output, output, True)
    layer_norm(f"{pool}.ln_q", output)
    layer_norm(f"{pool}.ln_kv", output)
    layer_norm(f"{tower}.ln_post", output)
    shapes[f"{tower}.proj"] = (output, output)
    if not config["tie_word_embeddings"]:
        linear("lm_head", width, config["vocab_size"], False)
    return shapes


def random_weights(config, seed):
    """Tensors of a config.json, float32, wide enough for peaked attention and spread-out logits."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in tensor_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        fan_in = values[0].numel() if len(shape) > 1 else 1
        if name == "transformer.ln_f.weight":
            values = values.sign()  # with tied embeddings a token would otherwise mostly predict itself
        elif ".ln_" in name:
            values = 0.1 * values + float(name.endswith("weight"))
        elif name.endswith("bias"):
            values = 0.2 * values
        elif "c_attn" in name or "in_proj" in name:
            values = 1.4 * values / fan_in**0.5  # attention logits of standard deviation near 2
        elif name == "lm_head.weight":
            values = 2.5 * values / fan_in**0.5
        elif name == "transformer.wte.weight":
            values = 0.4 * values
        elif name.endswith(("positional_embedding", "pos_embed", "query")):
            values = 0.5 * values
        else:
            values = values / fan_in**0.5
        weights[name] = values
    return weights


def make(folder, config, seed):
    """Writes a random checkpoint; returns its tensors in float64, as the reference takes them."""
    weights = random_weights(config, seed)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return {name: tensor.double() for name, tensor in weights.items()}


def random_inputs(config, seed, layouts):
    """Left-padded arrays; a layout is a tuple of text lengths and IMAGE, which is <img>, its slots, </img>.

    Returns a dict of NumPy arrays: input_ids, attention_mask [B, T], pixel_values [I, 3, Y, X] if there are images.
    """
    generator = np.random.default_rng(seed)
    visual = config["visual"]
    start, side = visual["image_start_id"], visual["image_size"]
    slots = np.full(visual.get("n_queries", 256), start + 2)
    rows, images = [], 0
    for layout in layouts:
        parts = []
        for part in layout:
            images += part == IMAGE
            image = np.concatenate([[start], slots, [start + 1]])
            parts.append(image if part == IMAGE else generator.integers(3, start, part))
        rows.append(np.concatenate(parts))
    length = max(map(len, rows))
    inputs = {
        "input_ids": np.stack([np.pad(row, (length - len(row), 0)) for row in rows]).astype(np.int64),
        "attention_mask": np.stack([np.arange(length) >= length - len(row) for row in rows]).astype(np.int64),
    }
    if images:
        inputs["pixel_values"] = generator.normal(size=(images, 3, side, side)).astype(np.float32)
    return inputs


def samples(config, inputs):
    """(ids without padding, pixels of its images) of each sample."""
    taken, found = 0, []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        count = int((ids == config["visual"]["image_start_id"]).sum())
        pixels = inputs["pixel_values"][taken : taken + count] if count else ()
        found.append((ids[mask.astype(bool)], pixels))
        taken += count
    return found
