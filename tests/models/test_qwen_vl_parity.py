"""Qwen-VL of 2023 against a float64 reference written from the published architecture; transformers has no class."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lvlm_jax import LVLM, models
from lvlm_jax.errors import LVLMError
from lvlm_jax.models.qwen_vl_vision import bicubic_weights, sinusoidal_initializer
from lvlm_jax.weights.save import stored_shapes
from tests.models import qwen_vl_checkpoints as checkpoints
from tests.models.qwen_vl_checkpoints import IMAGE, PUBLISHED, VARIETIES
from tests.reference import qwen_vl as reference

PADDED = [(6,), (3, IMAGE, 5), (2, IMAGE, 4, IMAGE, 9)]
LAYOUTS = {
    "one_image": [(4, IMAGE, 6)],
    "two_images": [(4, IMAGE, 3, IMAGE, 6)],
    "text": [(9,)],
    "padded": PADDED,
}
NEW_TOKENS = 32


@pytest.fixture(scope="module", params=list(VARIETIES))
def pair(request, tmp_path_factory):
    """(config.json, tensors in float64, our model), the last two from one folder."""
    folder, config = tmp_path_factory.mktemp(request.param), VARIETIES[request.param]
    weights = checkpoints.make(folder, config, seed=11)
    return config, weights, LVLM.from_pretrained(folder, dtype="float32")


@pytest.mark.parametrize("layouts", list(LAYOUTS.values()), ids=list(LAYOUTS))
def test_logits(pair, layouts):
    config, weights, model = pair
    inputs = checkpoints.random_inputs(config, seed=5, layouts=layouts)
    logits = np.asarray(model.logits(inputs))
    for row, (ids, pixels) in enumerate(checkpoints.samples(config, inputs)):
        want = reference.logits(weights, config, ids, pixels)
        assert want.std() > 1
        np.testing.assert_allclose(logits[row, -len(ids) :], want, rtol=0, atol=1e-4)


def test_greedy_tokens(pair):
    """Each token is the reference's most likely one after those before it."""
    config, weights, model = pair
    inputs = checkpoints.random_inputs(config, seed=8, layouts=PADDED)
    out = model.generate(inputs, max_new_tokens=NEW_TOKENS, stop_token_ids=())
    for tokens, (ids, pixels) in zip(out.tokens, checkpoints.samples(config, inputs), strict=True):
        assert len(tokens) == NEW_TOKENS
        logits = reference.logits(weights, config, np.concatenate([ids, tokens]), pixels)
        np.testing.assert_array_equal(tokens, logits[len(ids) - 1 : -1].argmax(-1))
    # A run stuck on one token would hide a wrong position or cache slot.
    assert max(len(set(tokens)) for tokens in out.tokens) > 8


def test_prefill_and_decode_give_the_logits_of_one_pass(pair):
    config, weights, model = pair
    inputs = checkpoints.random_inputs(config, seed=6, layouts=PADDED)
    forced = np.random.default_rng(7).integers(3, 400, (len(PADDED), 3))
    state, step = model.prefill(inputs, max_length=inputs["input_ids"].shape[1] + 8)
    steps = [step]
    for column in forced.T:
        state, step = model.decode(state, column.astype(np.int32))
        steps.append(step)
    got = np.stack([np.asarray(step.main) for step in steps], axis=1)
    for row, (ids, pixels) in enumerate(checkpoints.samples(config, inputs)):
        want = reference.logits(weights, config, np.concatenate([ids, forced[row]]), pixels)[-4:]
        np.testing.assert_allclose(got[row], want, rtol=0, atol=1e-4)


def test_saving_writes_the_tensors_that_were_loaded(pair, tmp_path):
    config, weights, model = pair
    folder = model.save_pretrained(tmp_path / "saved")
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(saved[name].double(), tensor), name
    again = LVLM.from_pretrained(folder)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_image_slots_may_hold_anything(pair):
    """The published tokenizer writes the bytes of a path there; one <imgpad> alone is expanded."""
    config, _, model = pair
    inputs = checkpoints.random_inputs(config, seed=9, layouts=LAYOUTS["two_images"])
    want = model.prepare(inputs)
    pad = config["visual"]["image_start_id"] + 2
    ids = inputs["input_ids"][0]
    path = ids.copy()
    path[np.flatnonzero(ids == pad)[:11]] = np.arange(100, 111)
    single = ids[(ids != pad) | (np.roll(ids, 1) != pad)]
    for given in (path, single):
        got = model.prepare({"input_ids": given[None], "pixel_values": inputs["pixel_values"]})
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_array_equal(got.image_id, want.image_id)


def test_full_size_tensors():
    """Names and shapes of the 9.6 billion parameters of Qwen/Qwen-VL and Qwen/Qwen-VL-Chat."""
    config = models.config_from_hf(PUBLISHED)
    stored = stored_shapes(config)
    assert stored == checkpoints.tensor_shapes(PUBLISHED)
    assert sum(math.prod(shape) for shape in stored.values()) == 9_656_935_168
    assert stored["transformer.h.31.attn.c_attn.weight"] == (12288, 4096)
    assert stored["transformer.h.31.mlp.w1.weight"] == (11008, 4096)
    assert stored["transformer.visual.positional_embedding"] == (256, 1664)
    assert stored["transformer.visual.transformer.resblocks.47.mlp.c_fc.weight"] == (8192, 1664)
    assert stored["transformer.visual.attn_pool.kv_proj.weight"] == (4096, 1664)
    assert (config.model_type, config.tokens_per_image, config.image_token_id) == ("qwen_vl", 256, 151859)
    assert (config.eos_token_ids, config.pad_token_id) == ((151643,), 151643)
    assert config.text.max_position_embeddings == 2048  # beyond it the published model stretches positions


def test_context():
    longer = models.config_from_hf({**PUBLISHED, "use_dynamic_ntk": False, "use_logn_attn": False})
    assert longer.text.max_position_embeddings == 8192


@pytest.mark.parametrize(
    "generation, stops",
    [
        ({}, (151643,)),
        ({"chat_format": "raw", "eos_token_id": 151643, "stop_words_ids": [[151643]]}, (151643,)),
        ({"chat_format": "chatml", "eos_token_id": 151643}, (151643, 151645, 151644)),
        ({"chat_format": "chatml", "eos_token_id": [5, 6]}, (5, 6, 151645, 151644)),
    ],
)
def test_stop_tokens(generation, stops):
    assert models.config_from_hf(PUBLISHED).stop_tokens(generation) == stops


@pytest.mark.parametrize("target", [16, 20, 32, 5])
def test_bicubic_weights_are_those_of_torch(target):
    table = torch.randn(16, 16, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = reference.grid_positions(table.reshape(256, 3), target**2).reshape(target, target, 3)
    weights = bicubic_weights(16, target)
    got = np.einsum("ya,xb,abw->yxw", weights, weights, table.numpy())
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-5)


def test_resampler_positions():
    """Channels 0 to E/4 are sines of the column, then cosines of it, then the same of the row."""
    places = np.asarray(sinusoidal_initializer(jax.random.key(0), (16, 8))).reshape(4, 4, 8)
    for row in range(4):
        for column in range(4):
            angles = [np.array([place, place / 100]) for place in (column, row)]
            want = np.concatenate([turn(angle) for angle in angles for turn in (np.sin, np.cos)])
            np.testing.assert_allclose(places[row, column], want, atol=1e-6)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"visual": None}, "text model"),
        ({"quantization_config": {"bits": 4}}, "full weights"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"kv_channels": 64}, "kv_channels 64"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'"),
        ({"visual": {**PUBLISHED["visual"], "output_dim": 2048}}, "output_dim 2048"),
        ({"visual": {**PUBLISHED["visual"], "n_queries": 200}}, "n_queries 200"),
        ({"visual": {**PUBLISHED["visual"], "width": None}}, "visual.width is None"),
        ({"visual": {**PUBLISHED["visual"], "heads": 15}}, "visual.heads 15"),
        ({"visual": {**PUBLISHED["visual"], "mlp_ratio": "4"}}, "mlp_ratio"),
        ({"visual": {**PUBLISHED["visual"], "image_start_id": 100}}, "image_start_id is 100"),
    ],
)
def test_configurations_that_are_refused(change, match):
    with pytest.raises(LVLMError, match=match):
        models.config_from_hf({**PUBLISHED, **change})


def test_stop_words_of_several_tokens_are_refused():
    with pytest.raises(LVLMError, match="stop_words_ids"):
        models.config_from_hf(PUBLISHED).stop_tokens({"stop_words_ids": [[1, 2]]})


def test_inputs_that_are_refused():
    config = VARIETIES["published_switches"]
    model = LVLM({}, models.config_from_hf(config))
    inputs = checkpoints.random_inputs(config, seed=1, layouts=LAYOUTS["one_image"])
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    short = dataclasses.replace(model.config.text, max_position_embeddings=20)
    crowded = LVLM({}, dataclasses.replace(model.config, text=short))
    for which, given, match in (
        (model, {"input_ids": ids[:, :12], "pixel_values": pixels}, "1 <img> and 0 </img>"),
        (model, {"input_ids": ids[:, ::-1], "pixel_values": pixels}, "not in pairs"),
        (model, {"input_ids": ids, "pixel_values": pixels[..., :-2]}, "pixel_values has shape"),
        (model, {"input_ids": ids, "pixel_values": np.full_like(pixels, np.nan)}, "NaN"),
        (model, {"input_ids": np.delete(ids, 6, axis=1), "pixel_values": pixels}, "15 image tokens"),
        (model, {"input_ids": ids}, "give one image for each"),
        (crowded, {"input_ids": ids, "pixel_values": pixels}, "context is 20"),
    ):
        with pytest.raises(LVLMError, match=match):
            which.prepare(given)
