"""InternVL against transformers on random checkpoints, its tiles, and its tables at the published sizes."""

import numpy as np
import pytest
import torch
from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
)

from lvlm_jax import LVLM, models
from lvlm_jax.errors import LVLMError
from lvlm_jax.processors.load import processor_class
from lvlm_jax.weights.save import stored_shapes
from tests.models.internvl_checkpoints import IMAGE_TOKEN, build, configuration, random_inputs
from tests.models.siglip_checkpoints import (
    assert_decode_equals_one_pass,
    assert_logits_equal,
    behind,
    byte_tokenizer,
    greedy_of,
    logits_of,
)

ALONE = [(4, (2,), 3, (1,), 6)]
PADDED = [(26,), (3, (2,), 5), (2, (1,), 4, (3,), 9)]

# Overrides of `configuration`.
VARIETIES = {
    "layer_norm_qwen2": {},
    "rms_norm_qk_norm_llama": {
        "text": {
            "model_type": "llama",
            "attention_bias": True,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000.0},
        },
        "vision": {
            "norm_type": "rms_norm",
            "use_qk_norm": True,
            "attention_bias": False,
            "use_mask_token": True,
            "use_mean_pooling": False,
            "layer_norm_eps": 1e-3,
            "hidden_act": "gelu_pytorch_tanh",
        },
        "tie_word_embeddings": True,
    },
    "inner_layer_wide_shuffle_qwen3": {
        "text": {"model_type": "qwen3", "head_dim": 16},
        "vision": {"image_size": [32, 32], "patch_size": [4, 4], "use_absolute_position_embeddings": False},
        "vision_feature_layer": -2,
        "downsample_ratio": 0.25,
        "projector_hidden_act": "silu",
    },
}


@pytest.fixture(scope="module", params=list(VARIETIES))
def pair(request, tmp_path_factory):
    """(transformers' model, ours), loaded from the same folder."""
    folder = tmp_path_factory.mktemp(request.param)
    return build(folder, 11, **VARIETIES[request.param]), LVLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return with_processor(tmp_path_factory.mktemp("processor"))


def with_processor(folder):
    """A model with a processor beside it, whose tokens are bytes."""
    first = 259
    build(folder, 12, text={"vocab_size": first + 4}, image_token_id=first)
    tokenizer = byte_tokenizer(
        ["<IMG_CONTEXT>", "<img>", "</img>", "<video>"],
        context_image_token="<IMG_CONTEXT>", start_image_token="<img>", end_image_token="</img>",
        video_token="<video>",
    )  # fmt: skip
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{{ '<IMG_CONTEXT>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
    )
    config = models.config_from_hf(configuration().to_dict())
    pixels = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, max_patches=6)
    processor = processor_class(config)(pixels, tokenizer, image_seq_length=4, chat_template=template)
    processor.save_pretrained(folder)
    return LVLM.from_pretrained(folder)


@pytest.mark.parametrize("layouts", [ALONE, PADDED], ids=["alone", "padded"])
def test_logits(pair, layouts):
    theirs, ours = pair
    inputs = random_inputs(theirs.config, 5, layouts)
    assert_logits_equal(ours.logits(inputs), logits_of(theirs, inputs), inputs["attention_mask"])


def test_prefill_and_decode_give_the_logits_of_one_pass(pair):
    theirs, ours = pair
    assert_decode_equals_one_pass(ours, random_inputs(theirs.config, 6, PADDED), behind)


def test_greedy_tokens(pair):
    theirs, ours = pair
    inputs = random_inputs(theirs.config, 8, PADDED)
    want = greedy_of(theirs, inputs, 32)
    out = ours.generate(inputs, max_new_tokens=32)
    np.testing.assert_array_equal(np.stack([np.asarray(tokens) for tokens in out.tokens]), want)
    assert min(len(set(row)) for row in want.tolist()) > 2


def test_a_saved_checkpoint_loads_in_transformers(pair, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path / "saved")
    again = InternVLForConditionalGeneration.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    inputs = random_inputs(theirs.config, 9, ALONE)
    np.testing.assert_allclose(logits_of(again, inputs), logits_of(theirs, inputs), rtol=0, atol=1e-4)


# The decoders of OpenGVLab/InternVL3-1B-hf to -78B-hf (Qwen2.5 with 10 more tokens) and their two towers; what their
# files leave out is the class's default.
SMALL_TOWER = dict(attention_bias=True)
LARGE_TOWER = dict(
    hidden_size=3200, intermediate_size=12800, num_hidden_layers=45, num_attention_heads=25,
    norm_type="rms_norm", use_qk_norm=True,
)  # fmt: skip


def qwen2(*sizes):
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    fields = {
        "model_type": "qwen2",
        "vocab_size": 151674,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
    }
    return fields | dict(zip(names, sizes, strict=True))


SIZES = {
    "1b": (0.94, SMALL_TOWER, qwen2(896, 4864, 24, 14, 2)),
    "2b": (2.09, SMALL_TOWER, qwen2(1536, 8960, 28, 12, 2)),
    "8b": (7.94, SMALL_TOWER, qwen2(3584, 18944, 28, 28, 4)),
    "14b": (15.12, SMALL_TOWER, qwen2(5120, 13824, 48, 40, 8)),
    "38b": (38.39, LARGE_TOWER, qwen2(5120, 27648, 64, 40, 8)),
    "78b": (78.41, LARGE_TOWER, qwen2(8192, 29568, 80, 64, 8)),
}
QUICK = "1b"


@pytest.mark.parametrize(
    "size", [size if size == QUICK else pytest.param(size, marks=pytest.mark.slow) for size in SIZES]
)
def test_every_tensor_of_the_published_sizes(size):
    billions, tower, text = SIZES[size]
    raw = {
        "model_type": "internvl",
        "image_token_id": 151667,
        "text_config": text,
        "vision_config": {"model_type": "internvl_vision"} | tower,
    }
    with torch.device("meta"):
        state = InternVLForConditionalGeneration(InternVLConfig.from_dict(raw)).state_dict()
    config = models.config_from_hf(raw)
    assert stored_shapes(config, "state_dict") == {name: tuple(t.shape) for name, t in state.items()}
    assert sum(tensor.numel() for tensor in state.values()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert config.tokens_per_tile == 256 and not config.text.tie_word_embeddings


def picture(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_messages_equal_the_processors_own_arrays(ours):
    """A wide and a tall picture, cut into tiles: each is one image."""
    pictures = [picture(90, 30), picture(28, 60, 1)]
    parts = [
        {"type": "image", "image": pictures[0]},
        {"type": "text", "text": "a "},
        {"type": "image", "image": pictures[1]},
        {"type": "text", "text": "b"},
    ]
    prompt = ours.prepare([{"role": "user", "content": parts}])
    want = ours.processor(images=pictures, text="<IMG_CONTEXT>\na <IMG_CONTEXT>\nb", return_tensors="np")
    length, tiles = want["input_ids"].shape[1], len(want["pixel_values"])
    np.testing.assert_array_equal(prompt.tokens[:, -length:], want["input_ids"])
    np.testing.assert_array_equal(prompt.pixels[:tiles], want["pixel_values"])
    assert [(prompt.image_id == image).sum() for image in (1, 2)] == [4 * 4, 4 * 3]  # with a thumbnail each
    assert prompt.owner.tolist() == [0] * 4 + [1] * 3 + [-1] and not prompt.pixels[tiles:].any()
    text = ours.prepare([{"role": "user", "content": "only words"}])
    assert text.pixels is None and np.isfinite(ours.logits(text)).all()


def test_prompts_with_one_placeholder_per_image(ours):
    arrays = random_inputs(configuration(), 4, [(4, (2,), 3, (1,), 5)], ours.config.image_token_id)
    expanded, tokens = ours.prepare(arrays), arrays["input_ids"][0]
    first = (tokens == ours.config.image_token_id) & ~np.pad(tokens == ours.config.image_token_id, 1)[:-2]
    short = {"input_ids": tokens[first | (tokens != ours.config.image_token_id)][None]}
    known = ours.prepare(short | {"pixel_values": arrays["pixel_values"], "num_patches": np.array([2, 1])})
    np.testing.assert_array_equal(known.tokens, expanded.tokens)
    np.testing.assert_array_equal(known.image_id, expanded.image_id)
    single = ours.prepare(short | {"pixel_values": arrays["pixel_values"][:2]})
    assert single.owner.tolist() == [0, 1] and single.image_id.max() == 2
    only = ours.prepare(
        {"input_ids": np.array([[5, ours.config.image_token_id, 6]]), "pixel_values": arrays["pixel_values"]}
    )
    assert only.owner.tolist() == [0, 0, 0] and (only.image_id == 1).sum() == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"pixel_values": a["pixel_values"][:, :, :20]}, "expected .tiles, 3, 28, 28."),
        (lambda a: {"pixel_values": a["pixel_values"][:2]}, "12 image tokens and pixel_values has 2 tiles"),
        (lambda a: {"pixel_values": a["pixel_values"] * np.nan}, "NaN"),
        (lambda a: {name: a[name][:, :-4] for name in ("input_ids", "attention_mask")}, "11 image tokens"),
        (
            lambda a: {"input_ids": a["input_ids"][:, [4, *range(1, 4), 0, *range(5, 22)]]},
            "image 1 .* has 1 tokens",
        ),
        (lambda a: {"num_patches": np.array([3, 1])}, "num_patches is .3, 1. and pixel_values has 3 tiles"),
        (lambda a: {"num_patches": np.array([3.0])}, "num_patches"),
    ],
)
def test_bad_arrays(ours, change, message):
    arrays = random_inputs(configuration(), 4, [(4, (2,), 3, (1,), 3)], ours.config.image_token_id)
    with pytest.raises(LVLMError, match=message):
        ours.prepare(arrays | change(arrays))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"vision": {"norm_type": "batch_norm"}}, "norm_type 'batch_norm'"),
        ({"vision": {"image_size": [28, 56]}}, "image_size .28, 56."),
        ({"vision": {"num_channels": 1}}, "num_channels 1"),
        ({"vision": {"num_attention_heads": 5}}, "num_attention_heads 5"),
        ({"vision": {"hidden_act": "tanh"}}, "hidden_act 'tanh'"),
        ({"downsample_ratio": 0.3}, "downsample_ratio 0.3"),
        ({"downsample_ratio": 1 / 3}, "downsample_ratio 0.33"),
        ({"vision_feature_layer": [-2, -1]}, "vision_feature_layer .-2, -1."),
        ({"vision_feature_layer": 3}, "vision_feature_layer 3"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy 'full'"),
    ],
)
def test_configurations_that_are_refused(overrides, message):
    with pytest.raises(LVLMError, match=message):
        models.config_from_hf(configuration(**overrides).to_dict())


def test_flags_that_transformers_4_leaves_out_are_those_of_the_decoder():
    raw = configuration(text={"tie_word_embeddings": True}).to_dict()
    del raw["tie_word_embeddings"]
    config = models.config_from_hf(raw)
    assert config.text.tie_word_embeddings and config.hf["tie_word_embeddings"] is True
    assert config.image_token_id == IMAGE_TOKEN
