"""The authors' own layout: configuration, separate tower, image token behind the vocabulary."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlavaForConditionalGeneration

from lvlm_jax import models, weights
from lvlm_jax.weights.original import append_rows, to_hf_config
from lvlm_jax.weights.tables import flatten
from tests.refusals import refused
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


@pytest.fixture
def original(halves, tmp_path):
    """The folder of a checkpoint whose tower lies beside."""
    make.clip_model(halves[1], True).save_pretrained(tmp_path / "clip-small")
    return write(tmp_path / "llava", halves[0])


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
def test_tower_beside_the_checkpoint(whole, model, halves, tmp_path):
    state, tower = halves
    clip, folder = make.clip_model(tower, whole), tmp_path / "clip-small"
    clip.save_pretrained(folder)
    checkpoint = write(tmp_path / "llava", state)
    assert_right(*load(checkpoint), model)
    (folder / "model.safetensors").unlink()
    stored = clip.state_dict() if whole else tower
    torch.save(stored | {"vision_model.embeddings.position_ids": torch.arange(5)[None]}, folder / "pytorch_model.bin")
    assert_right(*load(checkpoint), model)


def test_tower_named_by_argument_or_absolute_path(model, halves, tmp_path):
    state, tower = halves
    named = tmp_path / "elsewhere" / "tower"
    make.clip_model(tower, True).save_pretrained(named)
    assert_right(*load(write(tmp_path / "a", state), vision_tower=str(named)), model)
    assert_right(*load(write(tmp_path / "b", state, tower=str(named))), model)
    # One that is inside the checkpoint is taken, but where another is named.
    other = {name: tensor + 1 for name, tensor in tower.items()}
    make.clip_model(other, True).save_pretrained(tmp_path / "clip-small")
    inside = write(tmp_path / "c", make.renamed(make.tensors(model), *make.ORIGINAL))
    assert_right(*load(inside), model)
    bias = np.asarray(load(inside, vision_tower=tmp_path / "clip-small")[1]["vision_tower/pre_layernorm/bias"])
    np.testing.assert_array_equal(bias, other["vision_model.pre_layrnorm.bias"].numpy())


def test_saved_again_it_is_a_normal_checkpoint(model, original, tmp_path):
    config = make.config_of(original)
    params = weights.load_parameters(original, config)
    saved = weights.save_checkpoint(tmp_path / "out", params, config)
    make.assert_same(make.load(saved), params)
    loaded, report = LlavaForConditionalGeneration.from_pretrained(saved, output_loading_info=True)
    assert not any(report.values())
    inputs = {"input_ids": torch.tensor([[1, 5, 90, 90, 90, 90, 7, 8]]), "pixel_values": torch.randn(1, 3, 28, 28)}
    model.config.image_token_id = model.model.config.image_token_id = VOCABULARY
    model.resize_token_embeddings(128)
    with torch.no_grad():
        wanted = model(**inputs).logits[..., :VOCABULARY]
        found = loaded.float().eval()(**inputs).logits
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


def test_unsupported_configurations_and_towers(original, halves, model, tmp_path):
    published = make.original_config("openai/clip-small", VOCABULARY)
    for name, value, message in (
        ("mm_projector_type", "linear", "{} 'linear'"), ("mm_projector_type", "mlp3x_gelu", "{} 'mlp3x_gelu'"),
        ("mm_vision_select_feature", "cls", "{} 'cls'"), ("mm_hidden_size", 64, "{} 64"),
        ("mm_vision_tower", "openai/absent", "vision_tower="), ("mm_patch_merge_type", "spatial_unpad", "{}"),
        ("mm_use_im_start_end", True, "{} of config.json is 'True'; expected false"),
        ("image_aspect_ratio", "anyres", "{} of config.json is 'anyres'.*LLaVA-NeXT"),
        ("image_aspect_ratio", ["pad"], "{}"), ("mm_resampler_type", "perceiver", "{}"),
    ):  # fmt: skip
        folder = make.write_config(original, published | {name: value})
        refused(message.format(name), weights.read_config, folder)
    known = published | {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 1024}
    refused("has no vision tower.*vision_tower=", make.load, make.write_config(original, known))
    make.write_config(original, published)
    stored = halves[1] | {"vision_model.extra": torch.ones(1)}
    save_file(stored, tmp_path / "clip-small" / "model.safetensors")
    refused("1 unexpected: vision_model.extra", make.load, original)
    (tmp_path / "clip-small" / "config.json").write_text('{"model_type": "siglip_vision_model"}')
    refused("siglip_vision_model", weights.read_config, original)
    whole = make.write_scheme(tmp_path / "m", model, make.HUB)  # has a tower
    refused("leave it out", weights.read_config, whole, vision_tower=tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_appended_rows(dtype):
    rows = np.asarray(torch.randn(7, 5).numpy(), np.float32).astype(np.dtype(dtype))
    grown = append_rows(rows, 3)
    assert grown.dtype == rows.dtype
    np.testing.assert_array_equal(grown[:7], rows)
    mean = rows.astype(np.float64).mean(0).astype(rows.dtype)
    np.testing.assert_array_equal(grown[7:], np.stack([mean] * 3))
