"""Qwen3-VL against transformers on random checkpoints, alone and in padded batches; its table at full size."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from lvlm_jax import LVLM, models
from lvlm_jax.errors import LVLMError
from lvlm_jax.weights.save import stored_shapes
from tests import checkpoints
from tests.models import grid_checkpoints, patch_parity, qwen2_checkpoints
from tests.models.patch_parity import LAYOUTS

VOCABULARY = 120
VARIETIES = {
    "plain": {},
    # Other sizes of patches, tokens and tables, biases, mergers in another order than their layers.
    "other": {
        "text": {
            "num_key_value_heads": 4,
            "head_dim": 12,
            "attention_bias": True,
            "hidden_act": "gelu",
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "mrope_section": [3, 2, 1],
                "mrope_interleaved": True,
            },
        },
        "vision": {
            "num_heads": 4,
            "hidden_act": "gelu",
            "patch_size": 3,
            "temporal_patch_size": 1,
            "spatial_merge_size": 3,
            "num_position_embeddings": 70,  # 8 x 8 and some that nothing reads
            "deepstack_visual_indexes": [2, 0],
            "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
        },
        "tie_word_embeddings": True,
    },
}
WITHOUT_DEEPSTACK = {"vision": {"deepstack_visual_indexes": []}}


def tiny_config(text=None, vision=None, **overrides):
    """A tiny configuration without an end-of-sequence token; `text` and `vision` override fields of its parts."""
    text_fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000.0,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        **(text or {}),
    }
    vision_fields = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": text_fields["hidden_size"],
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
        **(vision or {}),
    }
    return Qwen3VLConfig(
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


def make(folder, **overrides):
    """(transformers' model, ours) of a random checkpoint saved in `folder`."""
    config = tiny_config(**overrides)
    config._attn_implementation = "eager"
    theirs = Qwen3VLForConditionalGeneration(config).float().eval()
    checkpoints.randomize(theirs, seed=11)
    theirs.save_pretrained(folder)
    return theirs, LVLM.from_pretrained(folder, dtype="float32")


@pytest.fixture(scope="module", params=list(VARIETIES))
def pair(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp(request.param), **VARIETIES[request.param])


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


@pytest.mark.slow
def test_a_tower_that_only_its_last_layer_leaves(tmp_path):
    pair = make(tmp_path, **WITHOUT_DEEPSTACK)
    patch_parity.assert_equal_logits(*pair, LAYOUTS["padded"])
    patch_parity.assert_equal_greedy_tokens(*pair, LAYOUTS["padded"])


# What the config.json of the Qwen repositories says of Qwen3-VL-<size>-Instruct; parameters in billions.
TOWERS = {
    "small": dict(depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17]),
    "large": dict(depth=27, hidden_size=1152, intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24]),
}
SIZES = {
    "2b": (2.13, "small", dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28)),
    "4b": (4.44, "small", dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36)),
    "8b": (8.77, "large", dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36)),
    "32b": (33.36, "large", dict(hidden_size=5120, intermediate_size=25600, num_hidden_layers=64)),
}
HEADS = {"2b": 16, "4b": 32, "8b": 32, "32b": 64}


def published(size):
    _, tower, text = SIZES[size]
    tied = size in ("2b", "4b")
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": 151655,
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "dtype": "bfloat16",
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": HEADS[size],
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": [24, 20, 20],
                "rope_type": "default",
            },
            "rope_theta": 5000000,
            "use_cache": True,
            "vocab_size": 151936,
            **text,
            **({"tie_word_embeddings": True} if tied else {}),
        },
        "tie_word_embeddings": tied,
        "video_token_id": 151656,
        "vision_config": {
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "initializer_range": 0.02,
            "model_type": "qwen3_vl",
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **TOWERS[tower],
        },
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    }


@pytest.mark.parametrize(
    "size", ["2b", *(pytest.param(size, marks=pytest.mark.slow) for size in ("4b", "8b", "32b"))]
)
def test_every_tensor_of_the_full_size_classes_maps_by_exactly_one_row(size):
    raw = published(size)
    config = models.config_from_hf(raw)
    with torch.device("meta"):
        state = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(raw)).state_dict()
    if raw["tie_word_embeddings"]:
        state.pop("lm_head.weight")
    assert stored_shapes(config, "state_dict") == {name: tuple(t.shape) for name, t in state.items()}
    assert sum(tensor.numel() for tensor in state.values()) / 1e9 == pytest.approx(SIZES[size][0], abs=0.005)
    assert config.text.rope.theta == 5e6 and config.text.rope.interleaved and config.text.qk_norm
    assert config.eos_token_ids == (151645,) and config.bos_token_id == 151643


def test_the_processor_of_a_checkpoint(tmp_path):
    """The folder is laid out as on the hub; videos need torchvision, pictures do not."""
    tokenizer = qwen2_checkpoints.write_processor(tmp_path, "Qwen3VLProcessor")
    config = dataclasses.replace(
        models.config_from_hf(tiny_config().to_dict()),
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
    marker = "<|vision_start|><|image_pad|><|vision_end|>"
    text = f"<s>user\nCompare {marker}{marker}</s>\n<s>assistant\n"
    theirs = model.processor(images=pictures, text=text, return_tensors="np")
    np.testing.assert_array_equal(prompt.tokens[0][prompt.image_id[0] >= 0], theirs["input_ids"][0])
    np.testing.assert_array_equal(prompt.grids, theirs["image_grid_thw"][:, 1:] // 2)
    assert (prompt.grids[0, 0] > prompt.grids[0, 1]) and (prompt.grids[1, 0] < prompt.grids[1, 1])
    np.testing.assert_array_equal(prompt.pixels[prompt.geometry["valid"]], theirs["pixel_values"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"image_grid_thw": None}, "image_grid_thw is missing"),
        (
            lambda a: {"image_grid_thw": a["image_grid_thw"] + [[0, 1, 0]]},
            "7 x 12 patches; expected multiples of 2",
        ),
        (lambda a: {"input_ids": a["input_ids"][:, :-6], "attention_mask": None}, "image tokens"),
        (lambda a: {"pixel_values_videos": a["pixel_values"]}, "pixel_values_videos is given, but videos"),
        (
            lambda a: {"input_ids": np.where(a["input_ids"] == 118, 119, a["input_ids"])},
            "the video token 119",
        ),
    ],
)
def test_arrays_that_cannot_be_used(change, message):
    config = tiny_config()
    model = LVLM({}, models.config_from_hf(config.to_dict()))
    arrays = grid_checkpoints.random_inputs(config, 5, LAYOUTS["two"])
    changed = {name: array for name, array in (arrays | change(arrays)).items() if array is not None}
    with pytest.raises(LVLMError, match=message) as raised:
        model.prepare(changed)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"vision": {"deepstack_visual_indexes": [0, 3]}}, r"deepstack_visual_indexes \[0, 3\].*from 0 to 2"),
        ({"vision": {"deepstack_visual_indexes": [1, 1]}}, r"deepstack_visual_indexes \[1, 1\]"),
        ({"vision": {"deepstack_visual_indexes": [0, 1, 2]}}, "names 3 layers.*decoder's 2"),
        ({"vision": {"out_hidden_size": 64}}, "out_hidden_size is 64.*hidden_size 48"),
        (
            {
                "text": {
                    "rope_parameters": {
                        "rope_theta": 1e3,
                        "mrope_section": [4, 2, 2],
                        "mrope_interleaved": False,
                    }
                }
            },
            "mrope_interleaved false",
        ),
    ],
)
def test_configurations_that_are_not_supported(overrides, message):
    with pytest.raises(LVLMError, match=message):
        models.config_from_hf(tiny_config(**overrides).to_dict())
