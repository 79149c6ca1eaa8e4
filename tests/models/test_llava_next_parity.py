"""LLaVA-NeXT against transformers on random checkpoints: tiles, borders cut off, newlines, four kinds of decoder."""

import numpy as np
import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from lvlm_jax import LVLM, models
from lvlm_jax.errors import LVLMError
from lvlm_jax.pocket.tokenizer import CHAT_TEMPLATE
from lvlm_jax.weights.save import stored_shapes
from tests import small
from tests.models import tile_checkpoints as tiles
from tests.models.tile_checkpoints import LANDSCAPE, ONE, PADDED, PORTRAIT, SQUARE, TEXT, TWO

RESOLUTIONS = [[8, 16], [16, 8], [16, 16], [24, 8], [8, 24]]


def config_of(text=None, vision=None, **overrides):
    return LlavaNextConfig(
        text_config=tiles.text_config(**(text or {})),
        vision_config=tiles.vision_config("clip_vision_model", **(vision or {})),
        image_grid_pinpoints=RESOLUTIONS,
        image_token_index=small.IMAGE_TOKEN_ID,
        **{"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, **overrides},
    )


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIETIES = {
    "vicuna": {},
    "mistral": {
        "text": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None, "head_dim": 16},
        "vision": {"patch_size": 4, "hidden_act": "gelu"},
        "vision_feature_layer": [-2, -1],
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu_pytorch_tanh",
    },
    "llama3": {"text": {"num_key_value_heads": 2, "rope_parameters": LLAMA3}, "vision": {"patch_size": 3}},
    "qwen2_tied": {
        "text": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
        "tie_word_embeddings": True,
        "vision_feature_layer": 1,
    },
}


def build_processor():
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": tiles.TILE},
            crop_size={"height": tiles.TILE, "width": tiles.TILE},
            image_grid_pinpoints=RESOLUTIONS,
        ),
        tokenizer=small.build_processor().tokenizer,
        patch_size=2,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def load(folder, name):
    """(transformers' model, ours) of a variety."""
    theirs = tiles.make(LlavaNextForConditionalGeneration, config_of(**VARIETIES[name]), folder, seed=11)
    build_processor().save_pretrained(str(folder))
    return theirs, LVLM.from_pretrained(folder, dtype="float32")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return load(tmp_path_factory.mktemp("vicuna"), "vicuna")


@pytest.mark.parametrize("layouts", [ONE, TWO, TEXT, PADDED], ids=["one", "two", "text", "padded"])
def test_logits(pair, layouts):
    tiles.assert_same_logits(*pair, tiles.random_inputs(pair[0], seed=5, layouts=layouts))


def test_greedy_tokens(pair):
    tiles.assert_same_greedy_tokens(*pair, tiles.random_inputs(pair[0], seed=8, layouts=PADDED))


@pytest.mark.parametrize(
    "name", ["mistral", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama3", "qwen2_tied"))]
)
def test_other_decoders_and_connectors(tmp_path, name):
    theirs, ours = load(tmp_path, name)
    inputs = tiles.random_inputs(theirs, seed=5, layouts=PADDED)
    tiles.assert_same_logits(theirs, ours, inputs)
    tiles.assert_same_greedy_tokens(theirs, ours, inputs)


def test_cached_steps_give_the_logits_of_one_pass(pair):
    inputs = tiles.random_inputs(pair[0], seed=6, layouts=PADDED)
    forced = np.random.default_rng(7).integers(3, small.IMAGE_TOKEN_ID, (len(PADDED), 2))
    tiles.assert_cached_steps_give_one_pass(pair[1], inputs, forced)


def test_what_we_save_loads_in_transformers(pair, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path / "saved")
    again = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    inputs = tiles.random_inputs(theirs, seed=5, layouts=PADDED)
    with torch.no_grad():
        logits = again.eval()(**tiles.checkpoints.to_torch(inputs)).logits.numpy()
    tiles.assert_same_logits(theirs, None, inputs, logits)


def test_messages_are_laid_out_as_the_processor_does(pair):
    conversations = [
        tiles.conversation("What is this?", LANDSCAPE),
        tiles.conversation("Which is taller?", PORTRAIT, SQUARE),
    ]
    tiles.assert_prepared_like(pair[1], build_processor(), conversations)


def test_placeholders_that_are_not_expanded_are(pair):
    inputs = tiles.random_inputs(pair[0], seed=5, layouts=TWO)
    ids = inputs["input_ids"][0]
    image = ids == small.IMAGE_TOKEN_ID
    bare = ids[~image | np.append(True, ~image[:-1])]
    short = {**inputs, "input_ids": bare[None], "attention_mask": np.ones((1, len(bare)), np.int64)}
    np.testing.assert_array_equal(pair[1].prepare(short).tokens, pair[1].prepare(inputs).tokens)


# What the published config.json files say, and the number of parameters of the checkpoints in billions.
LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
QWEN = {"model_type": "qwen2", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64}
PUBLISHED = {
    "llava-v1.6-mistral-7b-hf": (
        LLAMA
        | {"model_type": "mistral", "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 32064}
        | {"sliding_window": None, "max_position_embeddings": 32768},
        32000,
        7.57,
    ),
    "llava-v1.6-vicuna-7b-hf": (LLAMA | {"intermediate_size": 11008, "vocab_size": 32064}, 32000, 7.06),
    "llama3-llava-next-8b-hf": (
        LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128320},
        128256,
        8.36,
    ),
    "llava-v1.6-34b-hf": (
        {"model_type": "llama", "hidden_size": 7168, "num_hidden_layers": 60, "num_attention_heads": 56}
        | {"intermediate_size": 20480, "num_key_value_heads": 8, "vocab_size": 64064},
        64000,
        34.75,
    ),
    "llava-next-72b-hf": (
        QWEN | {"intermediate_size": 24576, "num_key_value_heads": 64, "vocab_size": 152064},
        151646,
        72.7,
    ),
    "llava-next-110b-hf": (
        QWEN | {"intermediate_size": 49152, "num_key_value_heads": 8, "vocab_size": 152064},
        151646,
        111.6,
    ),
}
QUICK = "llava-v1.6-mistral-7b-hf"
TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}


@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]
)
def test_every_tensor_of_the_published_sizes_maps_by_exactly_one_row(name):
    text, image_token, billions = PUBLISHED[name]
    hf = LlavaNextConfig(
        text_config=text, vision_config=CLIPVisionConfig(**TOWER), image_token_index=image_token
    )
    with torch.device("meta"):
        state = LlavaNextForConditionalGeneration(hf).state_dict()
    config = models.config_from_hf(hf.to_dict())
    assert stored_shapes(config, "state_dict") == {key: tuple(tensor.shape) for key, tensor in state.items()}
    assert sum(tensor.numel() for tensor in state.values()) / 1e9 == pytest.approx(billions, rel=5e-3)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"image_sizes": None}, "image_sizes is missing"),
        ({"image_sizes": np.array([[8, 8]])}, "each of the 2 images"),
        ({"image_sizes": np.array([[10, 26], [0, 8]])}, "one positive height and width"),
        ({"image_sizes": np.array([[10, 26], [1, 9999]])}, "9999 x 1 pixels is too narrow"),
        ({"pixel_values": np.zeros((2, 3, 8, 8))}, r"\(2, 3, 8, 8\); expected \[images, tiles, 3, 8, 8\]"),
        ({"pixel_values": np.zeros((2, 2, 3, 8, 8))}, "has 2 tiles and its image_sizes call for 4"),
    ],
)
def test_arrays_that_do_not_fit(change, words):
    config = models.config_from_hf(config_of().to_dict())
    given = {"pixel_values": np.zeros((2, 5, 3, 8, 8)), "image_sizes": np.array([PORTRAIT, LANDSCAPE])}
    with pytest.raises(LVLMError, match=words):
        config.pictures([given | change], [])


def test_a_truncated_prompt_is_an_error(pair):
    inputs = tiles.random_inputs(pair[0], seed=5, layouts=TWO)
    cut = {name: inputs[name][:, :-40] for name in ("input_ids", "attention_mask")}
    with pytest.raises(LVLMError, match="was it truncated"):
        pair[1].prepare({**inputs, **cut})


@pytest.mark.parametrize(
    "change, words",
    [
        ({"vision_feature_select_strategy": "full"}, "'full' is not supported with tiles"),
        ({"image_grid_pinpoints": [[8, 16], [8, 20]]}, r"entry \[8, 20\] is not supported"),
        ({"image_grid_pinpoints": []}, r"entry \[\] is not supported"),
    ],
)
def test_configurations_that_are_not_supported(change, words):
    with pytest.raises(LVLMError, match=words):
        models.config_from_hf(config_of().to_dict() | change)
