"""Every naming scheme, file format and dtype loads to the same parameters."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lvlm_jax import models, weights
from lvlm_jax.errors import LVLMError
from lvlm_jax.weights.tables import flatten
from tests.weights import checkpoints as make


@pytest.fixture(scope="module")
def model():
    return make.random_model()


@pytest.fixture(scope="module")
def config(model):
    return models.config_from_hf(model.config.to_dict())


@pytest.fixture(scope="module")
def expected(model):
    return make.expected_parameters(model)


def assert_loads(folder, expected, dtype="float32"):
    config = make.config_of(folder)
    params = flatten(weights.load_parameters(folder, config, dtype))
    assert params.keys() == expected.keys()
    for path, array in params.items():
        assert array.dtype == dtype
        np.testing.assert_array_equal(np.asarray(array), expected[path].astype(array.dtype), err_msg=path)


@pytest.mark.parametrize(
    "pairs", [make.HUB, (), make.STATE_DICT_4, make.ORIGINAL], ids=["hub", "state_dict", "state_dict_4", "original"]
)
def test_naming_schemes(pairs, model, expected, tmp_path):
    assert_loads(make.write_scheme(tmp_path / "m", model, pairs), expected)


@pytest.mark.parametrize(("size", "shards"), [("1GB", 0), ("60KB", 3)])
def test_what_transformers_writes(size, shards, model, expected, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert len(list(tmp_path.glob("model-*.safetensors"))) >= shards
    assert_loads(tmp_path, expected)


def test_shards_without_an_index(model, expected, tmp_path):
    folder = make.write_sharded(tmp_path / "m", model.config.to_dict(), make.tensors(model), 3)
    (folder / "model.safetensors.index.json").unlink()
    assert_loads(folder, expected)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_dtypes(stored, wanted, model, tmp_path):
    rounded = make.random_model()
    rounded.to(stored).float()
    expected = make.expected_parameters(rounded)
    expected = {path: array.astype(jnp.dtype(wanted)) for path, array in expected.items()}
    assert_loads(make.write_scheme(tmp_path / "m", model, make.HUB, stored), expected, wanted)


def test_without_a_dtype_the_stored_one_stays(model, config, tmp_path):
    folder = make.write_scheme(tmp_path / "m", model, make.HUB, torch.float16)
    loaded = flatten(weights.load_parameters(folder, config))
    assert {leaf.dtype for leaf in loaded.values()} == {jnp.dtype("float16")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(dtype, zipped, model, tmp_path):
    rounded = make.random_model()
    rounded.to(dtype).float()
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    state = make.renamed(make.tensors(model, dtype), *make.HUB)
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_loads(tmp_path, make.expected_parameters(rounded))


def test_sharded_torch_files(model, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    state = make.renamed(make.tensors(model), *make.HUB)
    names = sorted(state)
    weight_map = {}
    for number in range(2):
        file = f"pytorch_model-{number + 1:05}-of-00002.bin"
        torch.save({name: state[name] for name in names[number::2]}, tmp_path / file)
        weight_map |= dict.fromkeys(names[number::2], file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_loads(tmp_path, expected)


def test_a_torch_file_with_code_is_refused(model, tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "created"), "w"))

    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    torch.save({"a": Attack()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(LVLMError, match="pytorch_model.bin"):
        weights.load_parameters(tmp_path, models.config_from_hf(model.config.to_dict()))
    assert not (tmp_path / "created").exists()


def test_files_instead_of_a_folder(model, config, expected, tmp_path):
    folder = make.write_scheme(tmp_path / "m", model, make.HUB)
    params = flatten(weights.load_parameters([folder / "model.safetensors"], config))
    np.testing.assert_array_equal(params["language_model/norm/scale"], expected["language_model/norm/scale"])


def test_known_buffers_are_passed_over(model, expected, tmp_path):
    state = make.renamed(make.tensors(model), *make.HUB)
    state["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    state["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    assert_loads(make.write(tmp_path / "m", model.config.to_dict(), state), expected)


def test_layers_behind_the_feature_layer_may_be_absent(model, config, expected, tmp_path):
    state = make.renamed(make.tensors(model), *make.HUB)
    unread = {name for name in state if "post_layernorm" in name or "vision_model.encoder.layers.2." in name}
    assert len(unread) == 18
    kept = {name: tensor for name, tensor in state.items() if name not in unread}
    folder = make.write(tmp_path / "m", model.config.to_dict(), kept)
    params = flatten(weights.load_parameters(folder, config))
    for path, array in params.items():
        read = not path.startswith(("vision_tower/post_layernorm/", "vision_tower/layers_2/"))
        np.testing.assert_array_equal(array, expected[path] if read else np.zeros_like(expected[path]))
    del kept["vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias"]
    folder = make.write(tmp_path / "n", model.config.to_dict(), kept)
    with pytest.raises(LVLMError, match=r"1 missing: vision_tower.*\.encoder.layers.1.mlp.fc1.bias$"):
        weights.load_parameters(folder, config)


def test_tied_embeddings(tmp_path):
    tied = make.random_model(tie=True)
    expected = make.expected_parameters(tied)
    del expected["language_model/lm_head/kernel"]
    state = make.renamed(make.tensors(tied), *make.HUB)
    assert_loads(make.write(tmp_path / "present", tied.config.to_dict(), state), expected)
    head = state.pop("language_model.lm_head.weight")
    assert_loads(make.write(tmp_path / "absent", tied.config.to_dict(), state), expected)
    state["language_model.lm_head.weight"] = head + 1
    folder = make.write(tmp_path / "different", tied.config.to_dict(), state)
    with pytest.raises(LVLMError, match="tie_word_embeddings"):
        weights.load_parameters(folder, models.config_from_hf(tied.config.to_dict()))


def test_parameters_do_not_alias_the_file(model, config, tmp_path):
    folder = make.write_scheme(tmp_path / "m", model, make.HUB)
    params = flatten(weights.load_parameters(folder, config, "float32"))
    before = {path: np.array(array) for path, array in params.items()}
    with open(folder / "model.safetensors", "r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(b"\xff" * size)
    for path, array in before.items():
        np.testing.assert_array_equal(np.array(params[path]), array, err_msg=path)
