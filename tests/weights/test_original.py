"""The authors' own layout: configuration, separate tower, image token behind the vocabulary."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlavaForConditionalGeneration

from lvlm_jax import models, weights
from lvlm_jax.errors import LVLMError
from lvlm_jax.weights.original import append_rows, to_hf_config
from lvlm_jax.weights.tables import flatten
from tests.weights import checkpoints as make

VOCABULARY = 90  # grows to 128; the image token becomes 90
VOCABULARY_PATHS = ("language_model/embed_tokens/embedding", "language_model/lm_head/kernel")


@pytest.fixture(scope="module")
def model():
    return make.random_model(vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def halves(model):
    return make.split_tower(make.tensors(model))


def write(folder, state, tower="openai/clip-small"):
    return make.write(folder, make.original_config(tower, VOCABULARY), state)


def load(folder, **options):
    config = models.config_from_hf(weights.read_config(folder, **options))
    return config, flatten(weights.load_parameters(folder, config, **options))


def assert_right(config, params, model):
    assert (config.text.vocab_size, config.image_token_id) == (128, VOCABULARY)
    assert config.feature_layers == (-2,) and config.feature_select == "default"
    expected = make.expected_parameters(model)
    assert params.keys() == expected.keys()
    for path, array in params.items():
        array, wanted = np.asarray(array), expected[path]
        if path == VOCABULARY_PATHS[1]:
            array, wanted = array.T, wanted.T
        if path in VOCABULARY_PATHS:
            added = array[VOCABULARY:]
            assert added.shape[0] == 128 - VOCABULARY
            np.testing.assert_allclose(added, np.broadcast_to(wanted.mean(0), added.shape), atol=1e-6)
            array = array[:VOCABULARY]
        np.testing.assert_array_equal(array, wanted, err_msg=path)


@pytest.mark.parametrize("whole", [True, False], ids=["CLIPModel", "CLIPVisionModel"])
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_tower_beside_the_checkpoint(whole, format, model, halves, tmp_path):
    state, tower = halves
    clip = make.clip_model(tower, whole)
    clip.save_pretrained(tmp_path / "clip-small")
    if format == "bin":
        (tmp_path / "clip-small" / "model.safetensors").unlink()
        stored = clip.state_dict() if whole else tower
        stored = stored | {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
        torch.save(stored, tmp_path / "clip-small" / "pytorch_model.bin")
    assert_right(*load(write(tmp_path / "llava", state)), model)


def test_tower_named_by_argument_or_absolute_path(model, halves, tmp_path):
    state, tower = halves
    make.clip_model(tower, True).save_pretrained(tmp_path / "elsewhere" / "tower")
    named = str(tmp_path / "elsewhere" / "tower")
    assert_right(*load(write(tmp_path / "a", state), vision_tower=named), model)
    assert_right(*load(write(tmp_path / "b", state, tower=named)), model)


def test_tower_inside_the_checkpoint(model, halves, tmp_path):
    make.clip_model(halves[1], True).save_pretrained(tmp_path / "clip-small")
    state = make.renamed(make.tensors(model), *make.ORIGINAL)
    other = {name: tensor + 1 for name, tensor in halves[1].items()}
    folder = write(tmp_path / "llava", state)
    assert_right(*load(folder), model)
    make.clip_model(other, True).save_pretrained(tmp_path / "other")
    _, params = load(folder, vision_tower=tmp_path / "other")
    bias = np.asarray(params["vision_tower/pre_layernorm/bias"])
    np.testing.assert_array_equal(bias, other["vision_model.pre_layrnorm.bias"].numpy())


def test_saved_again_it_is_a_normal_checkpoint(model, halves, tmp_path):
    make.clip_model(halves[1], True).save_pretrained(tmp_path / "clip-small")
    folder = write(tmp_path / "llava", halves[0])
    config = make.config_of(folder)
    params = weights.load_parameters(folder, config)
    saved = weights.save_checkpoint(tmp_path / "out", params, config)
    make.assert_same(weights.load_parameters(saved, make.config_of(saved)), params)
    loaded, report = LlavaForConditionalGeneration.from_pretrained(saved, output_loading_info=True)
    assert not any(report.values())
    tokens = torch.tensor([[1, 5, 90, 90, 90, 90, 7, 8]])
    pixels = torch.randn(1, 3, 28, 28)
    model.config.image_token_id = model.model.config.image_token_id = VOCABULARY
    model.resize_token_embeddings(128)
    with torch.no_grad():
        wanted = model(input_ids=tokens, pixel_values=pixels).logits[..., :VOCABULARY]
        found = loaded.float().eval()(input_ids=tokens, pixel_values=pixels).logits
    torch.testing.assert_close(found[..., :VOCABULARY], wanted)
    # The mean row's logit is the mean logit, so an added token never wins.
    mean = wanted.mean(-1, keepdim=True).expand(-1, -1, 128 - VOCABULARY)
    torch.testing.assert_close(found[..., VOCABULARY:], mean, atol=1e-4, rtol=1e-4)


def test_configuration_of_the_published_checkpoint(tmp_path):
    heads = dict.fromkeys(("num_attention_heads", "num_hidden_layers", "num_key_value_heads"), 32)
    widths = dict(hidden_size=4096, intermediate_size=11008, mm_hidden_size=1024, max_position_embeddings=4096)
    published = make.original_config("openai/clip-vit-large-patch14-336", 32000) | heads | widths
    config = models.config_from_hf(to_hf_config(tmp_path, published))
    assert (config.text.vocab_size, config.image_token_id, config.pad_token_id) == (32064, 32000, 32001)
    assert (config.vision.image_size, config.vision.num_layers, config.tokens_per_image) == (336, 24, 576)
    assert config.text.max_position_embeddings == 4096 and config.eos_token_ids == (2,)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type 'linear'"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type 'mlp3x_gelu'"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature 'cls'"),
        ({"mm_hidden_size": 64}, "mm_hidden_size 64"),
        ({"mm_vision_tower": "openai/absent"}, "vision_tower="),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end of config.json is 'True'; expected false"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio of config.json is 'anyres'.*LLaVA-NeXT"),
        ({"image_aspect_ratio": ["pad"]}, "image_aspect_ratio"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type"),
        ({"mm_resampler_type": "perceiver"}, "mm_resampler_type"),
    ],
)
def test_unsupported_configurations(change, message, halves, tmp_path):
    make.clip_model(halves[1], True).save_pretrained(tmp_path / "clip-small")
    folder = write(tmp_path / "llava", halves[0])
    make.change_config(folder, change)
    with pytest.raises(LVLMError, match=message):
        weights.read_config(folder)


def test_tower_weights_that_are_nowhere(halves, tmp_path):
    folder = write(tmp_path / "llava", halves[0], tower="openai/clip-vit-large-patch14-336")
    make.change_config(folder, {"mm_hidden_size": 1024})
    config = make.config_of(folder)
    with pytest.raises(LVLMError, match="holds no vision tower.*vision_tower="):
        weights.load_parameters(folder, config)


def test_a_tower_that_is_not_clip(halves, tmp_path):
    folder = write(tmp_path / "llava", halves[0])
    (tmp_path / "clip-small").mkdir()
    (tmp_path / "clip-small" / "config.json").write_text('{"model_type": "siglip_vision_model"}')
    with pytest.raises(LVLMError, match="siglip_vision_model"):
        weights.read_config(folder)


def test_a_foreign_tensor_in_the_tower_is_reported(halves, tmp_path):
    make.clip_model(halves[1], True).save_pretrained(tmp_path / "clip-small")
    stored = halves[1] | {"vision_model.extra": torch.ones(1)}
    save_file(stored, tmp_path / "clip-small" / "model.safetensors")
    folder = write(tmp_path / "llava", halves[0])
    with pytest.raises(LVLMError, match="1 unexpected: vision_model.extra"):
        weights.load_parameters(folder, make.config_of(folder))


def test_a_tower_for_a_checkpoint_that_has_one_is_refused(model, tmp_path):
    folder = make.write_scheme(tmp_path / "m", model, make.HUB)
    with pytest.raises(LVLMError, match="leave it out"):
        weights.read_config(folder, vision_tower=tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_appended_rows(dtype):
    rows = np.asarray(torch.randn(7, 5).numpy(), np.float32).astype(np.dtype(dtype))
    grown = append_rows(rows, 3)
    assert grown.dtype == rows.dtype
    np.testing.assert_array_equal(grown[:7], rows)
    mean = rows.astype(np.float64).mean(0).astype(rows.dtype)
    np.testing.assert_array_equal(grown[7:], np.stack([mean] * 3))
