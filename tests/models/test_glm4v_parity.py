"""GLM-4.1V against transformers on random checkpoints, alone and in padded batches; its table at full size."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Glm4vConfig, Glm4vForConditionalGeneration

from lvlm_jax import LVLM, models
from lvlm_jax.errors import LVLMError
from lvlm_jax.weights.save import stored_shapes
from tests import checkpoints, small
from tests.models import grid_checkpoints, patch_parity
from tests.models.patch_parity import LAYOUTS

VOCABULARY = 120
VARIETIES = {
    # Half of each head turns, as published.
    "plain": {},
    # Three quarters of a head turn, other sizes of patches, tokens and tables, biases in the tower.
    "other": {
        "text": {
            "num_key_value_heads": 4,
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-3,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "partial_rotary_factor": 0.75,
                "mrope_section": [1, 3, 2],
            },
        },
        "vision": {
            "num_heads": 4,
            "hidden_act": "gelu",
            "attention_bias": True,
            "rms_norm_eps": 1e-3,
            "patch_size": 3,
            "temporal_patch_size": 1,
            "spatial_merge_size": 3,
            "image_size": 27,
            "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
        },
        "tie_word_embeddings": True,
    },
}


def tiny_config(text=None, vision=None, **overrides):
    """A tiny configuration without an end-of-sequence token; `text` and `vision` override fields of its parts."""
    text_fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 2],
        },
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        **(text or {}),
    }
    vision_fields = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "out_hidden_size": text_fields["hidden_size"],
        **(vision or {}),
    }
    return Glm4vConfig(
        text_config=text_fields,
        vision_config=vision_fields,
        **{
            "image_start_token_id": VOCABULARY - 4,
            "image_end_token_id": VOCABULARY - 3,
            "image_token_id": VOCABULARY - 2,
            "video_start_token_id": VOCABULARY - 1,
            **overrides,
        },
    )


def make(folder, **overrides):
    """(transformers' model, ours) of a random checkpoint saved in `folder`."""
    config = tiny_config(**overrides)
    config._attn_implementation = "eager"
    theirs = Glm4vForConditionalGeneration(config).float().eval()
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


# What the config.json of zai-org/GLM-4.1V-9B-Thinking says.
PUBLISHED = {
    "architectures": ["Glm4vForConditionalGeneration"],
    "image_end_token_id": 151340,
    "image_start_token_id": 151339,
    "image_token_id": 151343,
    "model_type": "glm4v",
    "text_config": {
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": [151329, 151336, 151338, 151348],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 13696,
        "max_position_embeddings": 65536,
        "model_type": "glm4v_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "pad_token_id": 151329,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"mrope_section": [8, 12, 12], "rope_type": "default"},
        "rope_theta": 10000.0,
        "use_cache": True,
        "vocab_size": 151552,
    },
    "tie_word_embeddings": False,
    "video_end_token_id": 151342,
    "video_start_token_id": 151341,
    "video_token_id": 151344,
    "vision_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "depth": 24,
        "hidden_act": "silu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": 1536,
        "image_size": 336,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 13696,
        "model_type": "glm4v",
        "num_heads": 12,
        "out_hidden_size": 4096,
        "patch_size": 14,
        "rms_norm_eps": 1e-05,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}


def test_every_tensor_of_the_full_size_class_maps_by_exactly_one_row():
    config = models.config_from_hf(PUBLISHED)
    with torch.device("meta"):
        state = Glm4vForConditionalGeneration(Glm4vConfig.from_dict(PUBLISHED)).state_dict()
    assert stored_shapes(config, "state_dict") == {name: tuple(t.shape) for name, t in state.items()}
    assert sum(tensor.numel() for tensor in state.values()) / 1e9 == pytest.approx(10.29, abs=0.005)
    rope = config.text.rope
    assert rope.share == 0.5 and rope.pairs and rope.sections == (8, 12, 12) and not rope.interleaved
    assert config.eos_token_ids == (151329, 151336, 151338, 151348) and config.pad_token_id == 151329


SPECIALS = (
    "<|begin_of_image|>",
    "<|image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|video|>",
    "<|end_of_video|>",
)
CHAT_TEMPLATE = (
    "[gMASK]{% for message in messages %}<s>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|begin_of_image|><|image|><|end_of_image|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def write_processor(folder):
    """The files of a processor as the repository has them, over a tokenizer of bytes, which is returned."""
    tokenizer = small.build_processor().tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIALS)})
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("image_token", "chat_template", "processor_class"):
        settings.pop(name, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    preprocessor = {
        "image_processor_type": "Glm4vImageProcessor",
        "processor_class": "Glm4vProcessor",
        "size": {"shortest_edge": 8 * 8 * 8, "longest_edge": 8 * 8 * 32},
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return tokenizer


def test_the_processor_of_a_checkpoint(tmp_path):
    """The folder is laid out as on the hub; videos need torchvision, pictures do not."""
    tokenizer = write_processor(tmp_path)
    config = dataclasses.replace(
        models.config_from_hf(tiny_config().to_dict()),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|begin_of_video|>"),
    )
    model = LVLM({}, config, tmp_path)
    generator = np.random.default_rng(2)
    pictures = [
        Image.fromarray(generator.integers(0, 256, size, np.uint8)) for size in ((40, 21, 3), (17, 50, 3))
    ]
    content = [{"type": "text", "text": "Compare "}]
    content += [{"type": "image", "image": picture} for picture in pictures]
    prompt = model.prepare([{"role": "user", "content": content}])
    marker = "<|begin_of_image|><|image|><|end_of_image|>"
    text = f"[gMASK]<s>user\nCompare {marker}{marker}<s>assistant\n"
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
    ("change", "message"),
    [
        ({"vision_config": {"image_size": [16, 16]}}, r"image_size \[16, 16\]"),
        ({"vision_config": {"out_hidden_size": 48}}, "out_hidden_size is 48.*hidden_size 64"),
        ({"text_config": {"hidden_act": "mish"}}, "hidden_act 'mish'"),
        ({"text_config": None}, "no text_config"),
    ],
)
def test_configurations_that_are_not_supported(change, message):
    raw = tiny_config().to_dict()
    for part, fields in change.items():
        raw[part] = fields and raw[part] | fields
    raw = {name: value for name, value in raw.items() if value is not None}
    with pytest.raises(LVLMError, match=message):
        models.config_from_hf(raw)
