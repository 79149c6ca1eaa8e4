"""What only Qwen-VL of 2023 has: names that transformers does not know, slots, stop words, resampled positions."""

import dataclasses
import math

import chex
import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lvlm_jax import LVLM, models
from lvlm_jax.errors import LVLMError
from lvlm_jax.models.qwen_vl_vision import bicubic_weights, sinusoidal_initializer
from lvlm_jax.weights.save import stored_shapes
from tests.checkpoints import IMAGE
from tests.models.families.qwen_vl import PUBLISHED, QWEN_VL, tensor_shapes
from tests.reference import qwen_vl as reference


@pytest.mark.parametrize("variety", list(QWEN_VL.varieties))
def test_saving_writes_the_tensors_that_were_loaded(tmp_path, variety):
    theirs = QWEN_VL.build(tmp_path, **QWEN_VL.varieties[variety])
    model = LVLM.from_pretrained(tmp_path, dtype="float32")
    folder = model.save_pretrained(tmp_path / "saved")
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == theirs.weights.keys()
    for name, tensor in theirs.weights.items():
        assert torch.equal(saved[name].double(), tensor), name
    again = LVLM.from_pretrained(folder)
    assert again.config == model.config
    chex.assert_trees_all_equal(again.params, model.params)


@pytest.mark.parametrize("variety", list(QWEN_VL.varieties))
def test_image_slots_may_hold_anything(variety):
    """The published tokenizer writes the bytes of a path there; one <imgpad> alone is expanded."""
    config = QWEN_VL.config(**QWEN_VL.varieties[variety])
    model = LVLM({}, models.config_from_hf(config))
    inputs = QWEN_VL.inputs(config, seed=9, layouts=[(4, IMAGE, 3, IMAGE, 6)])
    want, ids, pad = model.prepare(inputs), inputs["input_ids"][0], config["visual"]["image_start_id"] + 2
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
    shapes = tensor_shapes(PUBLISHED)
    assert sum(math.prod(shape) for shape in shapes.values()) == 9_656_935_168
    assert shapes["transformer.h.31.attn.c_attn.weight"] == (12288, 4096)
    assert shapes["transformer.h.31.mlp.w1.weight"] == (11008, 4096)
    assert shapes["transformer.visual.positional_embedding"] == (256, 1664)
    assert shapes["transformer.visual.transformer.resblocks.47.mlp.c_fc.weight"] == (8192, 1664)
    assert shapes["transformer.visual.attn_pool.kv_proj.weight"] == (4096, 1664)
    assert (config.model_type, config.tokens_per_image, config.image_token_id) == ("qwen_vl", 256, 151859)
    assert (config.eos_token_ids, config.pad_token_id) == ((151643,), 151643)
    assert config.text.max_position_embeddings == 2048  # beyond it the published model stretches positions
    shallow = PUBLISHED | {"num_hidden_layers": 2, "visual": PUBLISHED["visual"] | {"layers": 2}}
    assert stored_shapes(models.config_from_hf(shallow)) == tensor_shapes(shallow)


@pytest.mark.slow
def test_every_full_size_tensor():
    assert stored_shapes(models.config_from_hf(PUBLISHED)) == tensor_shapes(PUBLISHED)


def test_context_and_stop_tokens():
    longer = models.config_from_hf({**PUBLISHED, "use_dynamic_ntk": False, "use_logn_attn": False})
    assert longer.text.max_position_embeddings == 8192
    config = models.config_from_hf(QWEN_VL.raw())
    short = dataclasses.replace(config.text, max_position_embeddings=20)
    with pytest.raises(LVLMError, match="context is 20"):
        crowded = LVLM({}, dataclasses.replace(config, text=short))
        crowded.prepare(QWEN_VL.inputs(QWEN_VL.config(), 1, [(4, IMAGE, 6)]))
    config = models.config_from_hf(PUBLISHED)
    for generation, stops in (
        ({}, (151643,)),
        ({"chat_format": "raw", "eos_token_id": 151643, "stop_words_ids": [[151643]]}, (151643,)),
        ({"chat_format": "chatml", "eos_token_id": 151643}, (151643, 151645, 151644)),
        ({"chat_format": "chatml", "eos_token_id": [5, 6]}, (5, 6, 151645, 151644)),
    ):
        assert config.stop_tokens(generation) == stops
    with pytest.raises(LVLMError, match="stop_words_ids"):
        config.stop_tokens({"stop_words_ids": [[1, 2]]})


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
    for row, column in np.ndindex(4, 4):
        angles = [np.array([place, place / 100]) for place in (column, row)]
        want = np.concatenate([turn(angle) for angle in angles for turn in (np.sin, np.cos)])
        np.testing.assert_allclose(places[row, column], want, atol=1e-6)
