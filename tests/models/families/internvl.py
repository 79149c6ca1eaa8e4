"""InternVL, in transformers' layout and in OpenGVLab's. In a layout (n,) stands for an image of n tiles.

The names of OpenGVLab's tensors are written out here, and InternLM2's fused projection is put together head by head:
nothing is taken from the key tables.
"""

import json

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import GotOcr2ImageProcessorPil, InternVLConfig, InternVLForConditionalGeneration

from lvlm_jax import LVLM, models
from lvlm_jax.processors.load import processor_class
from tests.models.families.base import Family, byte_tokenizer, chat_template, normal

IMAGE_TOKEN = 119


class InternVl(Family):
    classes = InternVLConfig, InternVLForConditionalGeneration
    layouts = {"padded": [(26,), (3, (2,), 5), (2, (1,), 4, (3,), 9)], "alone": [(4, (2,), 3, (1,), 6)]}
    two, one = (3, (2,), 4, (1,), 5), (2, (3,), 6)
    pictures = (30, 90), (60, 28)  # wide and tall: each is cut into tiles, and is one image
    counts = 4 * 4, 4 * 3  # with a thumbnail each
    marker = "<IMG_CONTEXT>\n"
    refused_layout = (4, (2,), 3, (1,), 3)
    refused_arrays = [
        (lambda a: {"pixel_values": a["pixel_values"][:, :, :20]}, "expected .tiles, 3, 28, 28."),
        (lambda a: {"pixel_values": a["pixel_values"][:2]}, "12 image tokens and pixel_values has 2 tiles"),
        (lambda a: {"pixel_values": a["pixel_values"] * np.nan}, "NaN"),
        (lambda a: {name: a[name][:, :-4] for name in ("input_ids", "attention_mask")}, "11 image tokens"),
        (lambda a: {"input_ids": a["input_ids"][:, [4, *range(1, 4), 0, *range(5, 22)]]}, "image 1 .* has 1 tokens"),
        (lambda a: {"num_patches": np.array([3, 1])}, "num_patches is .3, 1. and pixel_values has 3 tiles"),
        (lambda a: {"num_patches": np.array([3.0])}, "num_patches"),
    ]

    def image(self, config, part):
        vision = config.vision_config
        side = round(vision.image_size[0] // vision.patch_size[0] * config.downsample_ratio)
        return [config.image_token_id] * (side**2 * part[0])

    def pixels(self, config, generator, images):
        side, tiles = config.vision_config.image_size[0], sum(part[0] for one in images for part in one)
        return {"pixel_values": normal(generator, tiles, 3, side, side)}

    def with_processor(self, folder):
        self.build(folder, 12, text={"vocab_size": 263}, image_token_id=259)
        roles = dict(context_image_token="<IMG_CONTEXT>", start_image_token="<img>", end_image_token="</img>")
        roles |= dict(video_token="<video>")
        processor_class(models.config_from_hf(self.config().to_dict()))(
            GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, max_patches=6),
            byte_tokenizer(list(roles.values()), **roles),
            image_seq_length=4,
            chat_template=chat_template("<IMG_CONTEXT>\\n"),
        ).save_pretrained(folder)
        return LVLM.from_pretrained(folder)


def chat_config(config, decoder):
    """The `config.json` of OpenGVLab's layout; `decoder` is the name of their decoder's class."""
    text, vision = config.text_config.to_dict(), config.vision_config
    kept = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    kept += "max_position_embeddings rms_norm_eps hidden_act"
    llm = {"architectures": [decoder], "tie_word_embeddings": config.tie_word_embeddings}
    llm |= {name: text[name] for name in kept.split()} | {"eos_token_id": 2, "pad_token_id": 0, "temperature": 1.0}
    rope = text["rope_parameters"]
    llm["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        llm["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
    if decoder == "InternLM2ForCausalLM":
        llm |= {"model_type": "internlm2", "bias": config.text_config.attention_bias}
    kept = "hidden_size intermediate_size num_hidden_layers num_attention_heads norm_type".split()
    tower = {"model_type": "intern_vit_6b", "qkv_bias": vision.attention_bias, "qk_normalization": vision.use_qk_norm}
    tower |= {"image_size": vision.image_size[0], "patch_size": vision.patch_size[0]}
    tower |= {name: getattr(vision, name) for name in kept}
    own = {"downsample_ratio": config.downsample_ratio, "select_layer": config.vision_feature_layer}
    return INTERNVL.chat_config | {"llm_config": llm, "vision_config": tower} | own


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
            fused |= {name.replace("q_proj", f"{k}_proj"): t for k, t in zip("qkv", (query, key, value), strict=True)}
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


class InternVlChat(InternVl):
    """A LLaMA-like decoder under InternLM2's names, as OpenGVLab publishes it."""

    def build(self, folder, seed=11, **overrides):
        model = super().build(None, seed, text={"model_type": "llama"}, **overrides)
        write_chat(folder, model, internlm2=True)
        return model


INTERNVL, INTERNVL_CHAT = InternVl("internvl"), InternVlChat("internvl")
