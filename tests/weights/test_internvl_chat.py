"""OpenGVLab's layout of InternVL: configurations, and weights with InternLM2's fused projections."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import InternVLConfig, InternVLForConditionalGeneration

from lvlm_jax import LVLM, models
from lvlm_jax.weights import read_config
from lvlm_jax.weights.save import save_checkpoint, stored_shapes
from tests.models.families.internvl import INTERNVL, write_chat
from tests.refusals import refused
from tests.weights.checkpoints import config_of, write_config

LAYOUT = [(20,), (3, (2,), 5), (2, (1,), 4, (3,), 9)]

# What differs between the checkpoints: overrides of the model; without them it is no InternLM2.
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000.0}
KINDS = {
    "internlm2": {
        "text": {"model_type": "llama", "attention_bias": True, "rope_parameters": DYNAMIC},
        "vision": {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False},
    },
    "qwen2": {},
}


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request, tmp_path_factory):
    """(transformers' model, the folder with its tensors in OpenGVLab's layout)."""
    overrides = KINDS[request.param]
    theirs = INTERNVL.build(None, 21, **overrides)
    return theirs, write_chat(tmp_path_factory.mktemp(request.param), theirs, bool(overrides))


def assert_equal_at_the_end(got, want):
    """Logits of left-padded samples at their valid tokens."""
    for ours, theirs in zip(got, want, strict=True):
        assert theirs.std() > 1
        np.testing.assert_allclose(np.asarray(ours)[-len(theirs) :], theirs, rtol=0, atol=1e-4)


def test_logits_and_what_is_saved(pair, tmp_path):
    theirs, folder = pair
    ours = LVLM.from_pretrained(folder)
    inputs = INTERNVL.inputs(theirs.config, 5, LAYOUT)
    want = INTERNVL.logits(theirs, inputs)
    assert_equal_at_the_end(ours.logits(inputs), want)
    ours.save_pretrained(tmp_path / "saved")
    again = InternVLForConditionalGeneration.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    assert again.config.text_config.model_type == theirs.config.text_config.model_type
    assert_equal_at_the_end(INTERNVL.logits(again, inputs), want)
    reread = config_of(tmp_path / "saved")
    assert reread == ours.config and reread.tiles == (1, 6) and reread.template == "internvl2_5"
    # It keeps its names when asked, also its fused tensors: InternLM2's projections, and those of towers.
    stored = load_file(folder / "model.safetensors")
    scheme = "chat_internlm2" if "language_model.output.weight" in stored else "chat"
    assert stored_shapes(ours.config, scheme) == {name: tuple(t.shape) for name, t in stored.items()}
    save_checkpoint(tmp_path / "chat", ours.params, ours.config, scheme=scheme)
    saved = load_file(tmp_path / "chat" / "model.safetensors")
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in stored.items())


def sizes(*numbers):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, numbers, strict=True))


# `config.json` of OpenGVLab/InternVL2_5-2B, -8B and -26B, without what says nothing about the model.
COMMON = {
    "model_type": "internvl_chat", "downsample_ratio": 0.5, "dynamic_image_size": True, "force_image_size": 448,
    "max_dynamic_patch": 12, "min_dynamic_patch": 1, "pad2square": False, "ps_version": "v2", "select_layer": -1,
    "template": "internvl2_5", "torch_dtype": "bfloat16", "use_backbone_lora": 0, "use_llm_lora": 0,
    "use_thumbnail": True,
}  # fmt: skip
TOWER = {
    "architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "attention_dropout": 0.0,
    "drop_path_rate": 0.0, "dropout": 0.0, "hidden_act": "gelu", "image_size": 448, "initializer_factor": 1.0,
    "initializer_range": 0.02, "layer_norm_eps": 1e-06, "num_channels": 3, "patch_size": 14, "use_flash_attn": True,
}  # fmt: skip
SMALL = TOWER | sizes(1024, 4096, 24, 16) | {"norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True}
LARGE = TOWER | sizes(3200, 12800, 45, 25) | {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}
INTERNLM2 = {
    "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "attn_implementation": "flash_attention_2",
    "bias": False, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "max_position_embeddings": 32768,
    "num_key_value_heads": 8, "pad_token_id": 2, "rms_norm_eps": 1e-05, "rope_theta": 1000000, "top_k": 50,
    "rope_scaling": {"factor": 2.0, "type": "dynamic"}, "vocab_size": 92553,
}  # fmt: skip
SIZES = {
    "2b": (2.21, SMALL, sizes(2048, 8192, 24, 16)),
    "8b": (8.08, SMALL, sizes(4096, 14336, 32, 32)),
    "26b": (25.51, LARGE, sizes(6144, 16384, 48, 48)),
}


@pytest.mark.parametrize("size", ["2b", *(pytest.param(size, marks=pytest.mark.slow) for size in ("8b", "26b"))])
def test_published_internlm2_sizes(size, tmp_path):
    """Their configuration means a class of transformers of the right size; their tensors are as they publish them."""
    billions, tower, text = SIZES[size]
    raw = read_config(write_config(tmp_path, COMMON | {"vision_config": tower, "llm_config": INTERNLM2 | text}))
    with torch.device("meta"):
        state = InternVLForConditionalGeneration(InternVLConfig.from_dict(raw)).state_dict()
    config = models.config_from_hf(raw)
    assert stored_shapes(config, "state_dict") == {name: tuple(t.shape) for name, t in state.items()}
    assert sum(tensor.numel() for tensor in state.values()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert config.image_token_id == 92546 and config.tokens_per_tile == 256 and config.tiles == (1, 12)
    assert config.text.rope.kind == "dynamic" and config.text.rope.theta == 1e6
    wide, width = text["hidden_size"], tower["hidden_size"]
    last = f"language_model.model.layers.{text['num_hidden_layers'] - 1}"
    first = "vision_model.encoder.layers.0"
    expected = {
        f"{last}.attention.wqkv.weight": (wide + 16 * wide // text["num_attention_heads"], wide),
        f"{last}.attention.wo.weight": (wide, wide),
        f"{last}.feed_forward.w2.weight": (wide, text["intermediate_size"]),
        "language_model.model.tok_embeddings.weight": (92553, wide),
        "language_model.output.weight": (92553, wide),
        "vision_model.embeddings.class_embedding": (1, 1, width),
        "vision_model.embeddings.position_embedding": (1, 1025, width),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, 14, 14),
        f"{first}.attn.qkv.weight": (3 * width, width),
        f"{first}.ls1": (width,),
        "mlp1.0.weight": (4 * width,),
        "mlp1.1.weight": (wide, 4 * width),
        "mlp1.3.bias": (wide,),
    }
    stored = stored_shapes(config, "chat_internlm2")
    assert {name: stored.get(name) for name in expected} == expected
    assert (f"{first}.attn.qkv.bias" in stored) == tower["qkv_bias"]
    assert (f"{first}.attn.q_norm.weight" in stored) == tower["qk_normalization"]


@pytest.mark.parametrize(
    ("kind", "expected", "fields"),
    [
        ("Qwen2ForCausalLM", "qwen2", {}),
        ("Qwen3ForCausalLM", "qwen3", {"head_dim": 24}),
        ("LlamaForCausalLM", "llama", {"mlp_bias": True}),
        ("InternLM3ForCausalLM", "llama", {"qkv_bias": True, "bias": True}),
    ],
)
def test_decoders_and_special_tokens(kind, expected, fields, tmp_path):
    """Other decoders keep their own class; the tokenizer's files say what the image token and the last token are."""
    llm = {"architectures": [kind], "eos_token_id": 7, "vocab_size": 99} | sizes(48, 80, 2, 4) | fields
    write_config(tmp_path, COMMON | {"vision_config": SMALL, "llm_config": llm})
    tokens = {90: "<IMG_CONTEXT>", 80: "<|im_end|>"}
    files = {
        "tokenizer.json": {"added_tokens": [{"id": number, "content": text} for number, text in tokens.items()]},
        "tokenizer_config.json": {"added_tokens_decoder": {str(n): {"content": text} for n, text in tokens.items()}},
    }
    for name, content in files.items():  # either file will do
        (tmp_path / name).write_text(json.dumps(content))
        config = config_of(tmp_path)
        (tmp_path / name).unlink()
        assert config.text.model_type == expected
        assert config.image_token_id == 90 and config.eos_token_ids == (80,)
        assert config.text.head_dim == fields.get("head_dim", 12)
        assert config.text.mlp_bias == ("bias" in fields or "mlp_bias" in fields)
        assert config.text.attention_bias == ("qkv_bias" in fields or expected == "qwen2")


def test_configurations_that_are_refused(tmp_path):
    for change, message in (
        ({"ps_version": "v1"}, "ps_version 'v1' .* expected 'v2'"),
        ({"force_image_size": 224}, "force_image_size 224 .* expected 448"),
        *(({name: 16}, f"{name} 16") for name in ("use_llm_lora", "use_backbone_lora")),
        *(({name: value}, f"{name} {value}") for name, value in (("pad2square", True), ("use_thumbnail", False))),
        ({"llm_config": {"architectures": ["Phi3ForCausalLM"]}}, "architectures 'Phi3ForCausalLM'"),
        ({"llm_config": {"architectures": ["InternLM2ForCausalLM"]}}, "lacks hidden_size"),
        ({"llm_config": INTERNLM2 | {"rope_pos_id_version": "v2pe"}}, "rope_pos_id_version 'v2pe'"),
        ({"llm_config": {"architectures": ["InternLM3ForCausalLM"], "qkv_bias": True}}, "qkv_bias True and bias False"),
        ({"llm_config": INTERNLM2 | SIZES["2b"][2] | {"vocab_size": 500}}, "have no <IMG_CONTEXT>"),
        ({"vision_config": SMALL | {"model_type": "siglip"}}, "vision_config.model_type 'siglip'"),
        ({"vision_config": LARGE | {"layer_norm_eps": 1e-5}}, "layer_norm_eps 1e-05"),
    ):
        config = COMMON | {"vision_config": SMALL, "llm_config": INTERNLM2 | SIZES["2b"][2]} | change
        refused(message, read_config, write_config(tmp_path, config))
