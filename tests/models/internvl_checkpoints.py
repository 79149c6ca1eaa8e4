"""Small random InternVL checkpoints, in transformers' layout and in OpenGVLab's, and padded inputs for them.

The names of OpenGVLab's tensors are written out here, and InternLM2's fused projection is put together head by head:
nothing is taken from the key tables.
"""

import json

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, InternVLConfig, InternVLForConditionalGeneration

from tests import checkpoints
from tests.models.siglip_checkpoints import TEXT, padded

IMAGE_TOKEN = 119
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "attention_bias": True,
    "image_size": [28, 28],
    "patch_size": [7, 7],
}


def configuration(text=None, vision=None, **overrides):
    """A tiny InternVLConfig of 4 tokens per tile; `text` and `vision` override single fields of its parts."""
    text = {"model_type": "qwen2"} | TEXT | (text or {})
    return InternVLConfig(
        text_config=AutoConfig.for_model(**text),
        vision_config=VISION | (vision or {}),
        **{
            "image_token_id": IMAGE_TOKEN,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": None,
            **overrides,
        },
    )


def build(folder, seed, **overrides):
    """Saves a random checkpoint in `folder` (skipped when None) and returns the torch model, in float32."""
    config = configuration(**overrides)
    config._attn_implementation = "eager"
    model = InternVLForConditionalGeneration(config).float().eval()
    checkpoints.randomize(model, seed)
    if folder is not None:
        model.save_pretrained(folder)
    return model


def random_inputs(config, seed, layouts, image_token=IMAGE_TOKEN):
    """Left-padded arrays for a batch whose prompts are drawn at random.

    Args:
        config: the InternVLConfig of the model.
        seed: seed of tokens and pixels.
        layouts: one tuple per sample; an integer stands for that many text tokens, (n,) for an image of n tiles.
        image_token: the placeholder.

    Returns a dict of NumPy arrays: input_ids, attention_mask [B, S], and pixel_values [tiles, 3, h, w] of the images of
    all samples in reading order (absent when no sample has one).
    """
    generator = np.random.default_rng(seed)
    side = config.vision_config.image_size[0]
    tokens = round(side // config.vision_config.patch_size[0] * config.downsample_ratio) ** 2
    rows, tiles = [], 0
    for layout in layouts:
        parts = []
        for part in layout:
            if isinstance(part, tuple):
                tiles += part[0]
                parts.append([image_token] * (tokens * part[0]))
            else:
                parts.append(generator.integers(3, 110, part))
        rows.append(np.concatenate(parts))
    pixels = generator.normal(size=(tiles, 3, side, side)).astype(np.float32)
    return padded(rows) | ({"pixel_values": pixels} if tiles else {})


def chat_config(config, decoder):
    """The `config.json` of OpenGVLab's layout; `decoder` is the name of their decoder's class."""
    text, vision = config.text_config.to_dict(), config.vision_config
    kept = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act",
    )  # fmt: skip
    llm = {"architectures": [decoder], "tie_word_embeddings": config.tie_word_embeddings}
    llm |= {name: text[name] for name in kept} | {"eos_token_id": 2, "pad_token_id": 0, "temperature": 1.0}
    rope = text["rope_parameters"]
    llm["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        llm["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
    if decoder == "InternLM2ForCausalLM":
        llm |= {"model_type": "internlm2", "bias": config.text_config.attention_bias}
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "model_type": "internvl_chat",
        "llm_config": llm,
        "vision_config": {
            "model_type": "intern_vit_6b",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "image_size": vision.image_size[0],
            "patch_size": vision.patch_size[0],
            "norm_type": vision.norm_type,
            "qkv_bias": vision.attention_bias,
            "qk_normalization": vision.use_qk_norm,
        },
        "downsample_ratio": config.downsample_ratio,
        "select_layer": config.vision_feature_layer,
        "ps_version": "v2",
        "template": "internvl2_5",
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 6,
        "torch_dtype": "float32",
    }


_TOWER = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.patch_embeddings.projection.": "embeddings.patch_embedding.",
    "encoder.layer.": "encoder.layers.",
    ".attention.projection_layer.": ".attn.proj.",
    ".attention.": ".attn.",
    ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.",
    ".lambda_": ".ls",
}
_CONNECTOR = {"layer_norm.": "0.", "linear_1.": "1.", "linear_2.": "3."}
_INTERNLM2 = {
    "model.embed_tokens.": "model.tok_embeddings.",
    ".self_attn.o_proj.": ".attention.wo.",
    ".mlp.gate_proj.": ".feed_forward.w1.",
    ".mlp.down_proj.": ".feed_forward.w2.",
    ".mlp.up_proj.": ".feed_forward.w3.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
    "lm_head.": "output.",
}


def _renamed(name, pairs):
    for old, new in pairs.items():
        name = name.replace(old, new)
    return name


def chat_state(model, internlm2):
    """The tensors of a transformers model under OpenGVLab's names, InternLM2's or those of a LLaMA-like decoder."""
    state, text = model.state_dict(), model.config.text_config
    fused = {}
    for name in [name for name in state if ".q_proj." in name]:
        query, key, value = (state.pop(name.replace("q_proj", f"{kind}_proj")) for kind in "qkv")
        if "vision_tower" in name:
            fused[name.replace("q_proj", "qkv")] = torch.cat([query, key, value])
        elif not internlm2:
            fused |= {
                name.replace("q_proj", f"{k}_proj"): t
                for k, t in zip("qkv", (query, key, value), strict=True)
            }
        else:
            size = text.hidden_size // text.num_attention_heads
            group = text.num_attention_heads // text.num_key_value_heads
            heads = []
            for head in range(text.num_key_value_heads):
                for mate in range(group):
                    first = (head * group + mate) * size
                    heads.append(query[first : first + size])
                heads += [key[head * size : (head + 1) * size], value[head * size : (head + 1) * size]]
            fused[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(heads)
    renamed = {}
    for name, tensor in (state | fused).items():
        if name.startswith("model.vision_tower."):
            name = "vision_model." + _renamed(name.removeprefix("model.vision_tower."), _TOWER)
        elif name.startswith("model.multi_modal_projector."):
            name = "mlp1." + _renamed(name.removeprefix("model.multi_modal_projector."), _CONNECTOR)
        else:
            name = "language_model." + name.replace("model.language_model.", "model.")
            name = _renamed(name, _INTERNLM2) if internlm2 else name
        renamed[name] = tensor.contiguous().clone()
    return renamed


def write_chat(folder, model, internlm2, image_token=IMAGE_TOKEN, **changes):
    """Saves a model in OpenGVLab's layout; `changes` are made to the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    decoder = "InternLM2ForCausalLM" if internlm2 else "Qwen2ForCausalLM"
    (folder / "config.json").write_text(json.dumps(chat_config(model.config, decoder) | changes))
    (folder / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": image_token}))
    save_file(chat_state(model, internlm2), folder / "model.safetensors")
    return folder
