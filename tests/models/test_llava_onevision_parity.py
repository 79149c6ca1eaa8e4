"""LLaVA-OneVision against transformers on random checkpoints: shrunk feature maps, images alone and together."""

import numpy as np
import pytest
import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from lvlm_jax import LVLM, models
from lvlm_jax.errors import LVLMError
from lvlm_jax.pocket.tokenizer import CHAT_TEMPLATE
from lvlm_jax.processors.load import processor_class
from lvlm_jax.weights.save import stored_shapes
from tests import small
from tests.models import tile_checkpoints as tiles
from tests.models.tile_checkpoints import LANDSCAPE, ONE, PADDED, PORTRAIT, SQUARE, TEXT, TWO

RESOLUTIONS = [[8 * down, 8 * across] for down in range(1, 5) for across in range(1, 5)]
SMALL = (8, 14)  # two tiles, whose features are not shrunk
TILED = [(5, SMALL, 2), (3, LANDSCAPE, 4, SQUARE, 3)]  # as if each image came alone


def config_of(text=None, vision=None, **overrides):
    text = {"model_type": "qwen2", "num_key_value_heads": 2, **(text or {})}
    vision = {"vision_use_head": False, "hidden_act": "gelu_pytorch_tanh", **(vision or {})}
    return LlavaOnevisionConfig(
        text_config=tiles.text_config(**text),
        vision_config=tiles.vision_config("siglip_vision_model", **vision),
        image_grid_pinpoints=RESOLUTIONS,
        image_token_index=small.IMAGE_TOKEN_ID,
        video_token_index=2,
        **{
            "vision_aspect_ratio": "anyres_max_3",
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": None,
            **overrides,
        },
    )


VARIETIES = {
    "seven_billion": {},
    "half_a_billion": {  # tied, as its text part alone says
        "text": {"tie_word_embeddings": True},
        "vision": {"patch_size": 3, "hidden_act": "gelu"},
        "vision_feature_layer": [-2, -1],
        "vision_aspect_ratio": "anyres_max_2",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "relu",
    },
}


def build_processor():
    """Transformers' processor; the part for videos, which needs torchvision, is left out."""
    config = models.config_from_hf(config_of().to_dict())
    return processor_class(config)(
        image_processor=LlavaOnevisionImageProcessorPil(
            size={"height": tiles.TILE, "width": tiles.TILE}, image_grid_pinpoints=RESOLUTIONS
        ),
        tokenizer=small.build_processor().tokenizer,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_3",
        chat_template=CHAT_TEMPLATE,
    )


def load(folder, name):
    """(transformers' model, ours) of a variety."""
    hf = config_of(**VARIETIES[name])
    theirs = tiles.make(LlavaOnevisionForConditionalGeneration, hf, folder, seed=11)
    build_processor().save_pretrained(str(folder))
    return theirs, LVLM.from_pretrained(folder, dtype="float32")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return load(tmp_path_factory.mktemp("seven_billion"), "seven_billion")


@pytest.mark.parametrize(
    "layouts, together",
    [(ONE, True), (TWO, True), (TEXT, True), (PADDED, True), (TILED, False)],
    ids=["one", "two", "text", "padded", "tiled"],
)
def test_logits(pair, layouts, together):
    inputs = tiles.random_inputs(pair[0], seed=5, layouts=layouts, together=together)
    tiles.assert_same_logits(*pair, inputs)


def test_greedy_tokens(pair):
    inputs = tiles.random_inputs(pair[0], seed=8, layouts=PADDED, together=True)
    tiles.assert_same_greedy_tokens(*pair, inputs)


@pytest.mark.slow
def test_tied_embeddings_and_other_connectors(tmp_path):
    theirs, ours = load(tmp_path, "half_a_billion")
    assert ours.config.text.tie_word_embeddings
    inputs = tiles.random_inputs(theirs, seed=5, layouts=PADDED, together=True)
    tiles.assert_same_logits(theirs, ours, inputs)
    tiles.assert_same_greedy_tokens(theirs, ours, inputs)


def test_cached_steps_give_the_logits_of_one_pass(pair):
    inputs = tiles.random_inputs(pair[0], seed=6, layouts=PADDED, together=True)
    forced = np.random.default_rng(7).integers(3, small.IMAGE_TOKEN_ID, (len(PADDED), 2))
    tiles.assert_cached_steps_give_one_pass(pair[1], inputs, forced)


def test_what_we_save_loads_in_transformers(pair, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path / "saved")
    again = LlavaOnevisionForConditionalGeneration.from_pretrained(
        tmp_path / "saved", attn_implementation="eager"
    )
    inputs = tiles.random_inputs(theirs, seed=5, layouts=PADDED, together=True)
    with torch.no_grad():
        logits = again.eval()(**tiles.checkpoints.to_torch(inputs)).logits.numpy()
    tiles.assert_same_logits(theirs, None, inputs, logits)


def test_messages_are_laid_out_as_the_processor_does(pair):
    conversations = [
        tiles.conversation("What is this?", LANDSCAPE),
        tiles.conversation("Which is taller?", PORTRAIT, SQUARE),
    ]
    tiles.assert_prepared_like(pair[1], build_processor(), conversations)
    together = pair[1].prepare(conversations)
    np.testing.assert_array_equal(np.bincount(together.owner[together.owner >= 0]), [9, 1, 1])


def test_a_processor_is_what_reads_it(pair):
    assert isinstance(pair[1].processor, LlavaOnevisionProcessor)


# What the published config.json files say, and the number of parameters of the checkpoints in billions.
PUBLISHED = {
    "llava-onevision-qwen2-0.5b-ov-hf": (
        {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
        | {"num_key_value_heads": 2, "vocab_size": 152000, "tie_word_embeddings": True},
        0.894,
    ),
    "llava-onevision-qwen2-7b-ov-hf": (
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
        | {"num_key_value_heads": 4, "vocab_size": 152128},
        8.03,
    ),
    "llava-onevision-qwen2-72b-ov-hf": (
        {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64}
        | {"num_key_value_heads": 8, "vocab_size": 152128},
        73.2,
    ),
}
TOWER = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
QUICK = "llava-onevision-qwen2-0.5b-ov-hf"


@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]
)
def test_every_tensor_of_the_published_sizes_maps_by_exactly_one_row(name):
    decoder, billions = PUBLISHED[name]
    hf = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **decoder}, vision_config=SiglipVisionConfig(**TOWER)
    )
    with torch.device("meta"):
        model = LlavaOnevisionForConditionalGeneration(hf)
    state = model.state_dict()
    config = models.config_from_hf(hf.to_dict())
    if config.text.tie_word_embeddings:
        del state["lm_head.weight"]
    assert stored_shapes(config, "state_dict") == {key: tuple(tensor.shape) for key, tensor in state.items()}
    assert sum(tensor.numel() for tensor in state.values()) / 1e9 == pytest.approx(billions, rel=5e-3)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"image_sizes": None}, "image_sizes is missing"),
        ({"batch_num_images": np.array([1, 2])}, r"batch_num_images is \[1, 2\]; expected .* 2 in all"),
        ({"pixel_values_videos": np.zeros((1, 2, 3, 8, 8))}, "videos cannot be read"),
    ],
)
def test_arrays_that_do_not_fit(change, words):
    config = models.config_from_hf(config_of().to_dict())
    given = {"pixel_values": np.zeros((2, 9, 3, 8, 8)), "image_sizes": np.array([PORTRAIT, LANDSCAPE])}
    with pytest.raises(LVLMError, match=words):
        config.pictures([given | change], [])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"vision_feature_select_strategy": "default"}, "'default' is not supported with a SigLIP tower"),
        ({"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio 'anyres' is not supported"),
    ],
)
def test_configurations_that_are_not_supported(change, words):
    with pytest.raises(LVLMError, match=words):
        models.config_from_hf(config_of().to_dict() | change)
