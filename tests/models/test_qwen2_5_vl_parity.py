"""Qwen2.5-VL against transformers on random checkpoints, alone and in padded batches; its table at full size."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from lvlm_jax import LVLM, models
from lvlm_jax.errors import LVLMError
from lvlm_jax.weights.save import stored_shapes
from tests.models import patch_parity, qwen2_checkpoints
from tests.models.patch_parity import LAYOUTS

VARIETIES = {
    # Windows of 2 x 2 tokens, cut off at the end of pictures of an odd number of them; one layer without.
    "plain": {},
    # Windows everywhere, of a side that is no multiple of a token's; other sizes, activations and wavelengths.
    "other": {
        "text": {
            "num_key_value_heads": 4,
            "use_sliding_window": True,
            "sliding_window": 14,
            "max_window_layers": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "mrope_section": [4, 2, 2],
            },
        },
        "vision": {
            "depth": 2,
            "num_heads": 4,
            "hidden_act": "gelu_pytorch_tanh",
            "patch_size": 3,
            "temporal_patch_size": 1,
            "spatial_merge_size": 3,
            "window_size": 11,
            "fullatt_block_indexes": [],
            "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
        },
        "tie_word_embeddings": True,
    },
}


@pytest.fixture(scope="module", params=list(VARIETIES))
def pair(request, tmp_path_factory):
    """(transformers' model, ours), loaded from the same folder."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = qwen2_checkpoints.make(folder, "qwen2_5_vl", seed=11, **VARIETIES[request.param])
    return theirs, LVLM.from_pretrained(folder, dtype="float32")


@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=LAYOUTS)
def test_logits(pair, layouts):
    patch_parity.assert_equal_logits(*pair, layouts)


def test_positions(pair):
    patch_parity.assert_equal_positions(*pair, LAYOUTS["padded"])


def test_greedy_tokens(pair):
    patch_parity.assert_equal_greedy_tokens(*pair, LAYOUTS["padded"])


def test_prefill_and_decode_give_the_logits_of_one_pass(pair):
    patch_parity.assert_cached_decoding_equals_one_pass(*pair, LAYOUTS["padded"])


def test_image_tokens_do_not_depend_on_the_batch(pair):
    theirs, ours = pair
    patch_parity.assert_batched_image_tokens_equal_single(ours, theirs, LAYOUTS["padded"])


def test_a_saved_model_loads_in_transformers(pair, tmp_path):
    patch_parity.assert_saved_model_loads_in_transformers(*pair, tmp_path / "saved", LAYOUTS["two"])


def test_every_naming_scheme_loads(pair, tmp_path):
    patch_parity.assert_every_naming_scheme_loads(pair[1], tmp_path)


# What the config.json of the Qwen repositories says; parameters in billions.
SIZES = {
    "3b": (
        3.75,
        3420,
        dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16),
    ),
    "7b": (
        8.29,
        3420,
        dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28),
    ),
    "32b": (
        33.45,
        3456,
        dict(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40),
    ),
    "72b": (
        73.41,
        3456,
        dict(hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, num_attention_heads=64),
    ),
}
REST = {
    "3b": dict(num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True, max_window_layers=70),
    "7b": dict(num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False, max_window_layers=28),
    "32b": dict(num_key_value_heads=8, vocab_size=152064, tie_word_embeddings=False, max_window_layers=64),
    "72b": dict(num_key_value_heads=8, vocab_size=152064, tie_word_embeddings=False, max_window_layers=80),
}


def published(size):
    """The config.json of Qwen2.5-VL-<size>-Instruct."""
    _, tower_width, text = SIZES[size]
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 128000,
        "model_type": "qwen2_5_vl",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": tower_width,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        **text,
        **REST[size],
    }


LARGE = [pytest.param(size, marks=pytest.mark.slow) for size in ("7b", "32b", "72b")]


@pytest.mark.parametrize("size", ["3b", *LARGE])
def test_every_tensor_of_the_full_size_classes_maps_by_exactly_one_row(size):
    raw = published(size)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(raw))
    state = model.state_dict()
    if raw["tie_word_embeddings"]:
        state.pop("lm_head.weight")
    config = models.config_from_hf(raw)
    assert stored_shapes(config, "state_dict") == {name: tuple(t.shape) for name, t in state.items()}
    assert sum(tensor.numel() for tensor in state.values()) / 1e9 == pytest.approx(SIZES[size][0], abs=0.005)
    assert config.text.sliding_window == () and config.text.rope.sections == (16, 24, 24)
    assert config.vision.window == 8 and config.vision.full_layers == (7, 15, 23, 31)
    hub = set(stored_shapes(config, "hub"))
    assert {"visual.blocks.31.mlp.gate_proj.bias", "visual.merger.ln_q.weight", "lm_head.weight"} - hub == (
        {"lm_head.weight"} if raw["tie_word_embeddings"] else set()
    )


def test_the_processor_of_a_checkpoint(tmp_path):
    """Two conversations, of one picture each and of different sizes."""
    tokenizer = qwen2_checkpoints.write_processor(tmp_path, "Qwen2_5_VLProcessor")
    config = models.config_from_hf(published("3b"))
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, patch_size=4),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )
    model = LVLM({}, config, tmp_path)
    generator = np.random.default_rng(2)
    pictures = [
        Image.fromarray(generator.integers(0, 256, size, np.uint8)) for size in ((40, 21, 3), (17, 50, 3))
    ]
    prompt = model.prepare(
        [[{"role": "user", "content": [{"type": "image", "image": picture}]}] for picture in pictures]
    )
    text = "<s>user\n<|vision_start|><|image_pad|><|vision_end|></s>\n<s>assistant\n"
    patches = 0
    for row, picture in enumerate(pictures):
        theirs = model.processor(images=[picture], text=text, return_tensors="np")
        np.testing.assert_array_equal(prompt.tokens[row][prompt.image_id[row] >= 0], theirs["input_ids"][0])
        np.testing.assert_array_equal(prompt.grids[row], theirs["image_grid_thw"][0, 1:] // 2)
        count = len(theirs["pixel_values"])
        np.testing.assert_array_equal(prompt.pixels[row, :count], theirs["pixel_values"])
        assert not prompt.pixels[row, count:].any() and prompt.geometry["valid"][row].sum() == count
        patches += count
    assert prompt.geometry["valid"].sum() == patches


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"vision": {"window_size": 7}}, "window_size 7 .* at least 8 pixels"),
        ({"vision": {"temporal_patch_size": [2, 2]}}, r"temporal_patch_size \[2, 2\]"),
    ],
)
def test_configurations_that_are_not_supported(overrides, message):
    raw = qwen2_checkpoints.tiny_config("qwen2_5_vl", **overrides).to_dict()
    with pytest.raises(LVLMError, match=message):
        models.config_from_hf(raw)


def test_a_grid_that_is_not_whole_tokens(pair):
    theirs, ours = pair
    inputs = patch_parity.inputs_of(theirs, LAYOUTS["portrait"])
    inputs["image_grid_thw"] = np.array([[1, 8, 9]])
    with pytest.raises(LVLMError, match="8 x 9 patches; expected multiples of"):
        ours.prepare(inputs)
