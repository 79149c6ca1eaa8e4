"""OpenGVLab's layout of InternVL: configurations, weights with InternLM2's fused projections, processors."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.convert_slow_tokenizer import import_protobuf

from lvlm_jax import LVLM, models
from lvlm_jax.errors import LVLMError
from lvlm_jax.weights import read_config
from lvlm_jax.weights.save import save_checkpoint, stored_shapes
from tests.models.internvl_checkpoints import IMAGE_TOKEN, build, random_inputs, write_chat
from tests.models.siglip_checkpoints import assert_logits_equal, byte_tokenizer, logits_of

LAYOUT = [(20,), (3, (2,), 5), (2, (1,), 4, (3,), 9)]

# What differs between the checkpoints: (is it an InternLM2, overrides of the model).
KINDS = {
    "internlm2": (
        True,
        {
            "text": {
                "model_type": "llama",
                "attention_bias": True,
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000.0},
            },
            "vision": {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False},
        },
    ),
    "qwen2": (False, {}),
}


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request, tmp_path_factory):
    """(transformers' model, the folder with its tensors in OpenGVLab's layout)."""
    internlm2, overrides = KINDS[request.param]
    theirs = build(None, 21, **overrides)
    return theirs, write_chat(tmp_path_factory.mktemp(request.param), theirs, internlm2)


def test_logits_and_what_is_saved(pair, tmp_path):
    theirs, folder = pair
    ours = LVLM.from_pretrained(folder)
    inputs = random_inputs(theirs.config, 5, LAYOUT)
    want = logits_of(theirs, inputs)
    assert_logits_equal(ours.logits(inputs), want, inputs["attention_mask"])
    ours.save_pretrained(tmp_path / "saved")
    again = InternVLForConditionalGeneration.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    assert again.config.text_config.model_type == theirs.config.text_config.model_type
    np.testing.assert_allclose(logits_of(again, inputs), want, rtol=0, atol=1e-4)
    reread = models.config_from_hf(read_config(tmp_path / "saved"))
    assert reread == ours.config and reread.tiles == (1, 6) and reread.template == "internvl2_5"


def test_a_checkpoint_in_chat_layout_keeps_its_names_when_asked(pair, tmp_path):
    _, folder = pair
    stored = load_file(folder / "model.safetensors")
    scheme = "chat_internlm2" if "language_model.output.weight" in stored else "chat"
    ours = LVLM.from_pretrained(folder)
    save_checkpoint(tmp_path / "saved", ours.params, ours.config, scheme=scheme)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in stored.items())


# `config.json` of OpenGVLab/InternVL2_5-2B, -8B and -26B, without what says nothing about the model.
COMMON = {
    "model_type": "internvl_chat",
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 448,
    "max_dynamic_patch": 12,
    "min_dynamic_patch": 1,
    "pad2square": False,
    "ps_version": "v2",
    "select_layer": -1,
    "template": "internvl2_5",
    "torch_dtype": "bfloat16",
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    "use_thumbnail": True,
}
TOWER = {
    "architectures": ["InternVisionModel"],
    "model_type": "intern_vit_6b",
    "attention_dropout": 0.0,
    "drop_path_rate": 0.0,
    "dropout": 0.0,
    "hidden_act": "gelu",
    "image_size": 448,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-06,
    "num_channels": 3,
    "patch_size": 14,
    "use_flash_attn": True,
}
SMALL = TOWER | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "norm_type": "layer_norm",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "qk_normalization": False,
    "qkv_bias": True,
}
LARGE = TOWER | {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "norm_type": "rms_norm",
    "num_attention_heads": 25,
    "num_hidden_layers": 45,
    "qk_normalization": True,
    "qkv_bias": False,
}
INTERNLM2 = {
    "architectures": ["InternLM2ForCausalLM"],
    "model_type": "internlm2",
    "attn_implementation": "flash_attention_2",
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "num_key_value_heads": 8,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 2.0, "type": "dynamic"},
    "rope_theta": 1000000,
    "top_k": 50,
    "vocab_size": 92553,
}


def sizes(*numbers):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, numbers, strict=True))


SIZES = {
    "2b": (2.21, SMALL, sizes(2048, 8192, 24, 16)),
    "8b": (8.08, SMALL, sizes(4096, 14336, 32, 32)),
    "26b": (25.51, LARGE, sizes(6144, 16384, 48, 48)),
}


def written(folder, config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "size", ["2b", pytest.param("8b", marks=pytest.mark.slow), pytest.param("26b", marks=pytest.mark.slow)]
)
def test_published_internlm2_sizes(size, tmp_path):
    """Their configuration means a class of transformers of the right size; their tensors are as they publish them."""
    billions, tower, text = SIZES[size]
    published = COMMON | {"vision_config": tower, "llm_config": INTERNLM2 | text}
    raw = read_config(written(tmp_path / size, published))
    with torch.device("meta"):
        state = InternVLForConditionalGeneration(InternVLConfig.from_dict(raw)).state_dict()
    config = models.config_from_hf(raw)
    assert stored_shapes(config, "state_dict") == {name: tuple(t.shape) for name, t in state.items()}
    assert sum(tensor.numel() for tensor in state.values()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert config.image_token_id == 92546 and config.tokens_per_tile == 256 and config.tiles == (1, 12)
    assert config.text.rope.kind == "dynamic" and config.text.rope.theta == 1e6
    wide, width = text["hidden_size"], tower["hidden_size"]
    key_width = 8 * wide // text["num_attention_heads"]
    stored = stored_shapes(config, "chat_internlm2")
    last = f"language_model.model.layers.{text['num_hidden_layers'] - 1}"
    expected = {
        f"{last}.attention.wqkv.weight": (wide + 2 * key_width, wide),
        f"{last}.attention.wo.weight": (wide, wide),
        f"{last}.feed_forward.w2.weight": (wide, text["intermediate_size"]),
        "language_model.model.tok_embeddings.weight": (92553, wide),
        "language_model.output.weight": (92553, wide),
        "vision_model.embeddings.class_embedding": (1, 1, width),
        "vision_model.embeddings.position_embedding": (1, 1025, width),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "vision_model.encoder.layers.0.attn.qkv.weight": (3 * width, width),
        "vision_model.encoder.layers.0.ls1": (width,),
        "mlp1.0.weight": (4 * width,),
        "mlp1.1.weight": (wide, 4 * width),
        "mlp1.3.bias": (wide,),
    }
    assert {name: stored.get(name) for name in expected} == expected
    assert ("vision_model.encoder.layers.0.attn.qkv.bias" in stored) == tower["qkv_bias"]
    assert ("vision_model.encoder.layers.0.attn.q_norm.weight" in stored) == tower["qk_normalization"]


def test_decoders_and_special_tokens(tmp_path):
    """Other decoders keep their own class; the tokenizer's files say what the image token and the last token are."""
    for number, (kind, expected, fields) in enumerate([
        ("Qwen2ForCausalLM", "qwen2", {}),
        ("Qwen3ForCausalLM", "qwen3", {"head_dim": 24}),
        ("LlamaForCausalLM", "llama", {"mlp_bias": True}),
        ("InternLM3ForCausalLM", "llama", {"qkv_bias": True, "bias": True}),
    ]):  # fmt: skip
        llm = {"architectures": [kind], "eos_token_id": 7, "vocab_size": 99} | sizes(48, 80, 2, 4) | fields
        folder = written(tmp_path / kind, COMMON | {"vision_config": SMALL, "llm_config": llm})
        entries = [{"id": 90 + number, "content": "<IMG_CONTEXT>"}, {"id": 80, "content": "<|im_end|>"}]
        decoder = {str(entry["id"]): {"content": entry["content"]} for entry in entries}
        name, content = [
            ("tokenizer.json", {"added_tokens": entries}),
            ("tokenizer_config.json", {"added_tokens_decoder": decoder}),
        ][number % 2]
        (folder / name).write_text(json.dumps(content))
        config = models.config_from_hf(read_config(folder))
        assert config.text.model_type == expected
        assert config.image_token_id == 90 + number and config.eos_token_ids == (80,)
        assert config.text.head_dim == fields.get("head_dim", 12)
        assert config.text.mlp_bias == ("bias" in fields or "mlp_bias" in fields)
        assert config.text.attention_bias == ("qkv_bias" in fields or expected == "qwen2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ps_version": "v1"}, "ps_version 'v1' .* expected 'v2'"),
        ({"force_image_size": 224}, "force_image_size 224 .* expected 448"),
        ({"use_llm_lora": 16}, "use_llm_lora 16"),
        ({"use_backbone_lora": 16}, "use_backbone_lora 16"),
        ({"pad2square": True}, "pad2square True"),
        ({"use_thumbnail": False}, "use_thumbnail False"),
        ({"llm_config": {"architectures": ["Phi3ForCausalLM"]}}, "architectures 'Phi3ForCausalLM'"),
        ({"llm_config": {"architectures": ["InternLM2ForCausalLM"]}}, "lacks hidden_size"),
        ({"llm_config": INTERNLM2 | {"rope_pos_id_version": "v2pe"}}, "rope_pos_id_version 'v2pe'"),
        (
            {"llm_config": {"architectures": ["InternLM3ForCausalLM"], "qkv_bias": True}},
            "qkv_bias True and bias False",
        ),
        ({"llm_config": INTERNLM2 | SIZES["2b"][2] | {"vocab_size": 500}}, "do not name <IMG_CONTEXT>"),
        ({"vision_config": SMALL | {"model_type": "siglip"}}, "vision_config.model_type 'siglip'"),
        ({"vision_config": LARGE | {"layer_norm_eps": 1e-5}}, "layer_norm_eps 1e-05"),
    ],
)
def test_configurations_that_are_refused(change, message, tmp_path):
    config = COMMON | {"vision_config": SMALL, "llm_config": INTERNLM2 | SIZES["2b"][2]} | change
    with pytest.raises(LVLMError, match=message):
        read_config(written(tmp_path, config))


def internlm2_tokenizer(folder, prefix):
    """A SentencePiece file of single bytes and some merges, with special tokens over and behind its last pieces."""
    described = import_protobuf().ModelProto()
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"▁abcdef", "ab", "▁ab", "abc", "[UNUSED_1]", "[UNUSED_2]"]
    for number, piece in enumerate(pieces):
        entry = described.pieces.add()
        entry.piece, entry.score = piece, float(-number)
    described.trainer_spec.model_type = 2
    described.trainer_spec.unk_piece = "<unk>"
    described.trainer_spec.byte_fallback = True
    described.normalizer_spec.add_dummy_prefix = prefix
    (folder / "tokenizer.model").write_bytes(described.SerializeToString())
    count = len(pieces)
    specials = {count - 2: "<|im_start|>", count - 1: "<|im_end|>"}
    specials |= {count + i: token for i, token in enumerate(["<img>", "</img>", "<IMG_CONTEXT>"])}
    specials |= {0: "<unk>", 1: "<s>", 2: "</s>"}
    settings = {
        "tokenizer_class": "InternLM2Tokenizer",
        "added_tokens_decoder": {str(number): {"content": token} for number, token in specials.items()},
        **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return {token: number for number, token in [*enumerate(pieces), *specials.items()]}


@pytest.mark.parametrize("prefix", [False, True])
def test_messages_of_an_internlm2_checkpoint(prefix, tmp_path):
    ids = internlm2_tokenizer(tmp_path, prefix)
    model = build(None, 2, text={"model_type": "llama", "vocab_size": len(ids) + 8})
    write_chat(tmp_path, model, True, ids["<IMG_CONTEXT>"])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "size": 28}))
    ours = LVLM.from_pretrained(tmp_path)
    assert ours.config.eos_token_ids == (ids["<|im_end|>"],)
    picture = np.random.default_rng(1).integers(0, 256, (30, 90, 3), dtype=np.uint8)
    messages = [
        {"role": "system", "content": "ab"},
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "abc ab"}]},
    ]  # fmt: skip
    prompt = ours.prepare(messages)
    tokens = prompt.tokens[0, prompt.image_id[0] >= 0].tolist()
    assert tokens[0] == ids["<s>"] and tokens[1] == ids["<|im_start|>"]
    image = tokens.index(ids["<img>"])
    assert (
        tokens[image + 1 : image + 17] == [ids["<IMG_CONTEXT>"]] * 16 and tokens[image + 17] == ids["</img>"]
    )
    behind = tokens[image + 18 :]
    start = behind.index(ids["<|im_end|>"])
    # The line break, then "abc ab" by its merges; a blank is written before each stretch of text if the file says so.
    assert behind[:start] == [ids["▁"]] * prefix + [ids["<0x0A>"], ids["abc"], ids["▁ab"]]
    assert ours.processor.tokenizer.decode(behind[:start]) == "\nabc ab"
    assert (prompt.image_id == 1).sum() == 16 and prompt.owner.tolist() == [0] * 4
    whole = ours.processor.image_processor(images=[picture], crop_to_patches=True, return_tensors="np")
    np.testing.assert_array_equal(prompt.pixels, whole["pixel_values"])
    assert np.abs(whole["pixel_values"]).max() <= 0.5 / 0.224 + 1e-5


def qwen2_tokenizer(folder, specials):
    """The files of a Qwen2 tokenizer without merges; returns the number of the first special token."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    added = {
        str(len(words) + i): {"content": token, "special": True, "normalized": False}
        for i, token in enumerate(["<|endoftext|>", *specials])
    }
    settings = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(words) + 1


@pytest.mark.parametrize("kind", ["qwen2", "tokenizer.json"])
def test_messages_of_a_checkpoint_with_another_tokenizer(kind, tmp_path):
    """Tokenizers that transformers reads; the chat format with its own system message, and answers continued."""
    specials = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
    if kind == "qwen2":
        first = qwen2_tokenizer(tmp_path, specials)
    else:
        tokenizer, first = byte_tokenizer(specials), 259
        tokenizer.save_pretrained(tmp_path)
    model = build(None, 2, text={"vocab_size": 270})
    write_chat(tmp_path, model, False, first + 4)
    ours = LVLM.from_pretrained(tmp_path)
    picture = np.zeros((20, 20, 3), np.uint8)
    user = {
        "role": "user",
        "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}],
    }
    asked = ours.prepare([user])
    text = ours.processor.tokenizer.decode(asked.tokens[0, asked.image_id[0] >= 0])
    system = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: E501
    image = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
    assert text == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{image}\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )
    begun = ours.prepare([user, {"role": "assistant", "content": "A"}])
    assert ours.processor.tokenizer.decode(begun.tokens[0, begun.image_id[0] >= 0]) == text + "A"


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"tokenizer_class": "InternLM3Tokenizer"}, {}, "InternLM3Tokenizer.* copy tokenizer.json"),
        ({}, {"template": "Hermes-2"}, "chat template 'Hermes-2'"),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, {}, "cannot read the tokenizer of"),
    ],
)
def test_processors_that_cannot_be_made(settings, changes, message, tmp_path):
    write_chat(tmp_path, build(None, 2), False, IMAGE_TOKEN, **changes)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(LVLMError, match=message):
        LVLM.from_pretrained(tmp_path).prepare([{"role": "user", "content": "a"}])


def test_a_tokenizer_that_contradicts_the_configuration(tmp_path):
    first = qwen2_tokenizer(tmp_path, ["<img>", "</img>", "<IMG_CONTEXT>"])
    write_chat(tmp_path, build(None, 2, text={"vocab_size": 270}), False, first + 5)
    with pytest.raises(
        LVLMError, match=f"has <IMG_CONTEXT> at {first + 2} and the configuration at {first + 5}"
    ):
        LVLM.from_pretrained(tmp_path).prepare([{"role": "user", "content": "a"}])
