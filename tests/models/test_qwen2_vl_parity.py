"""Qwen2-VL against transformers on random checkpoints, alone and in padded batches; its table at full size."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from lvlm_jax import LVLM, models
from lvlm_jax.errors import LVLMError
from lvlm_jax.models import loose_patches, qwen_vision
from lvlm_jax.models.pictures import bucketed
from lvlm_jax.weights.save import stored_shapes
from tests.models import patch_parity, qwen2_checkpoints
from tests.models.patch_parity import LAYOUTS

VARIETIES = {
    "plain": {},
    # Other sizes of patches and tokens, other activation and wavelengths, a window in the decoder's second layer.
    "other": {
        "text": {
            "num_key_value_heads": 4,
            "use_sliding_window": True,
            "sliding_window": 14,
            "max_window_layers": 1,
            "hidden_act": "gelu",
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "mrope_section": [4, 2, 2],
            },
        },
        "vision": {
            "mlp_ratio": 3,
            "num_heads": 4,
            "hidden_act": "gelu",
            "patch_size": 3,
            "temporal_patch_size": 1,
            "spatial_merge_size": 3,
            "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
        },
        "tie_word_embeddings": True,
    },
}


@pytest.fixture(scope="module", params=list(VARIETIES))
def pair(request, tmp_path_factory):
    """(transformers' model, ours), loaded from the same folder."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = qwen2_checkpoints.make(folder, "qwen2_vl", seed=11, **VARIETIES[request.param])
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


def test_pictures_of_all_sizes_take_few_shapes():
    """Each shape is a program of the tower: up to 16384 tokens, the largest picture the published processors give."""
    shapes = {bucketed(tokens, loose_patches.SMALLEST_ROW) for tokens in range(1, 16385)}
    assert len(shapes) == 20 and max(shapes) == 16384
    rows = [
        loose_patches.patch_rows(
            [
                {
                    "pixel_values": np.zeros((height * width, 12)),
                    "image_grid_thw": np.array([[1, height, width]]),
                }
            ],
            channels=12,
            merge=2,
        )
        for height in range(2, 25, 2)
        for width in range(2, 25, 2)
    ]
    assert {row.pixels.shape for row in rows} == {
        (1, patches, 12) for patches in (64, 128, 192, 256, 384, 512, 768)
    }
    assert all(len(row.geometry["order"]) * 4 == row.pixels.shape[1] for row in rows)


def test_attention_by_blocks_is_attention_in_one_piece(monkeypatch):
    generator = np.random.default_rng(3)
    query, key, value = jnp.asarray(generator.normal(size=(3, 2, 48, 2, 8)), jnp.float32)
    groups = jnp.asarray(generator.integers(-1, 3, (2, 48)))
    whole = qwen_vision.grouped_attention(query, key, value, groups)
    monkeypatch.setattr(qwen_vision, "QUERY_BLOCK", 32)  # 48 patches go by blocks of 16
    np.testing.assert_allclose(qwen_vision.grouped_attention(query, key, value, groups), whole, atol=1e-6)


# What the config.json of the Qwen repositories says; parameters in billions.
TEXTS = {
    "2b": (
        2.21,
        dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12),
    ),
    "7b": (
        8.29,
        dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28),
    ),
    "72b": (
        73.41,
        dict(hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, num_attention_heads=64),
    ),
}
REST = {
    "2b": dict(num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "7b": dict(num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
    "72b": dict(num_key_value_heads=8, vocab_size=152064, tie_word_embeddings=False),
}


def published(size):
    """The config.json of Qwen2-VL-<size>-Instruct."""
    text = TEXTS[size][1]
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
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
        "max_position_embeddings": 32768,
        "max_window_layers": text["num_hidden_layers"],
        "model_type": "qwen2_vl",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "in_chans": 3,
            "hidden_size": text["hidden_size"],
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        **text,
        **REST[size],
    }


@pytest.mark.parametrize(
    "size", ["2b", *(pytest.param(size, marks=pytest.mark.slow) for size in ("7b", "72b"))]
)
def test_every_tensor_of_the_full_size_classes_maps_by_exactly_one_row(size):
    raw = published(size)
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_dict(raw))
    state = model.state_dict()
    if raw["tie_word_embeddings"]:
        state.pop("lm_head.weight")
    config = models.config_from_hf(raw)
    assert stored_shapes(config, "state_dict") == {name: tuple(t.shape) for name, t in state.items()}
    assert sum(tensor.numel() for tensor in state.values()) / 1e9 == pytest.approx(TEXTS[size][0], abs=0.005)
    assert config.text.sliding_window == () and config.text.rope.sections == (16, 24, 24)
    assert config.eos_token_ids == (151645,) and config.vision.hidden_act == "quick_gelu"
    hub = set(stored_shapes(config, "hub"))
    assert {"visual.blocks.31.attn.qkv.weight", "visual.merger.mlp.2.bias", "model.norm.weight"} < hub


def test_the_processor_of_a_checkpoint(tmp_path):
    """The folder is laid out as on the hub; videos need torchvision, pictures do not."""
    tokenizer = qwen2_checkpoints.write_processor(tmp_path, "Qwen2VLProcessor")
    config = models.config_from_hf(published("2b"))
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
    content = [{"type": "text", "text": "Compare "}]
    content += [{"type": "image", "image": picture} for picture in pictures]
    prompt = model.prepare([{"role": "user", "content": content}])
    text = "<s>user\nCompare <|vision_start|><|image_pad|><|vision_end|><|vision_start|><|image_pad|><|vision_end|>"
    text += "</s>\n<s>assistant\n"
    theirs = model.processor(images=pictures, text=text, return_tensors="np")
    np.testing.assert_array_equal(prompt.tokens[0][prompt.image_id[0] >= 0], theirs["input_ids"][0])
    grids = theirs["image_grid_thw"]
    assert len({tuple(grid) for grid in grids.tolist()}) == 2 and (grids[:, 1:] > 2).all()
    np.testing.assert_array_equal(prompt.grids, grids[:, 1:] // 2)
    np.testing.assert_array_equal(prompt.pixels[prompt.geometry["valid"]], theirs["pixel_values"])
    # Written out by hand once more: what a patch at some row and column of a picture holds.
    first = model.processor.image_processor(pictures[0], do_resize=True, return_tensors="np")
    np.testing.assert_array_equal(first["pixel_values"], prompt.pixels[0][: len(first["pixel_values"])])
    coordinates = prompt.geometry["coordinates"][0][: len(first["pixel_values"])]
    np.testing.assert_array_equal(coordinates[:6], [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3]])


@pytest.fixture(scope="module")
def arrays(pair):
    return patch_parity.inputs_of(pair[0], LAYOUTS["two"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"image_grid_thw": None}, "image_grid_thw is missing"),
        (lambda a: {"pixel_values": None}, "pixel_values is missing"),
        (
            lambda a: {"pixel_values": a["pixel_values"][:-1]},
            "has 143 patches and image_grid_thw asks for 144",
        ),
        (lambda a: {"pixel_values": a["pixel_values"][:, :-1]}, r"expected \[patches, "),
        (lambda a: {"image_grid_thw": a["image_grid_thw"][:, 1:]}, r"expected whole numbers \[images, 3\]"),
        (lambda a: {"image_grid_thw": a["image_grid_thw"] * [[2, 1, 1]]}, "an image of 2 frames"),
        (
            lambda a: {"image_grid_thw": a["image_grid_thw"] + [[0, 1, 0]]},
            "7 x 12 patches; expected multiples of",
        ),
        (
            lambda a: {"image_grid_thw": a["image_grid_thw"][:1]},
            "has 144 patches and image_grid_thw asks for 72",
        ),
        (lambda a: {"pixel_values": a["pixel_values"] * np.nan}, "NaN or infinite"),
        (lambda a: {"input_ids": a["input_ids"][:, :-6], "attention_mask": None}, "image tokens"),
        (lambda a: {"pixel_values_videos": a["pixel_values"]}, "pixel_values_videos is given, but videos"),
        (
            lambda a: {"input_ids": np.where(a["input_ids"] == 118, 119, a["input_ids"])},
            "the video token 119",
        ),
    ],
)
def test_arrays_that_cannot_be_used(pair, arrays, change, message):
    changed = {name: array for name, array in (arrays | change(arrays)).items() if array is not None}
    with pytest.raises(LVLMError, match=message) as raised:
        pair[1].prepare(changed)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"vision": {"in_channels": 1}}, "in_channels 1"),
        ({"vision": {"patch_size": [4, 4]}}, r"patch_size \[4, 4\]"),
        ({"vision": {"hidden_act": "mish"}}, "hidden_act 'mish'"),
        ({"vision": {"embed_dim": 36}}, "width 36 with 2 heads"),
        (
            {
                "text": {
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e3, "mrope_section": [2, 2, 2]}
                }
            },
            r"mrope_section \[2, 2, 2\]",
        ),
    ],
)
def test_configurations_that_are_not_supported(overrides, message):
    raw = qwen2_checkpoints.tiny_config("qwen2_vl", **overrides).to_dict()
    with pytest.raises(LVLMError, match=message):
        models.config_from_hf(raw)
