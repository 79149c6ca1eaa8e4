"""Every naming scheme, file format and dtype loads to the same parameters."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lvlm_jax import weights
from lvlm_jax.weights.tables import flatten
from tests.refusals import refused
from tests.weights import checkpoints as make


@pytest.fixture(scope="module")
def expected(drawn):
    return make.expected_parameters(drawn)


def assert_loads(folder, expected, dtype="float32"):
    params = flatten(make.load(folder, dtype))
    assert params.keys() == expected.keys()
    for path, array in params.items():
        assert array.dtype == dtype
        np.testing.assert_array_equal(np.asarray(array), expected[path].astype(array.dtype), err_msg=path)


@pytest.mark.parametrize(
    "pairs", [make.HUB, (), make.STATE_DICT_4, make.ORIGINAL], ids=["hub", "state_dict", "state_dict_4", "original"]
)
def test_naming_schemes(pairs, drawn, expected, tmp_path):
    assert_loads(make.write_scheme(tmp_path / "m", drawn, pairs), expected)


@pytest.mark.parametrize(("size", "shards"), [("1GB", 0), ("60KB", 3)])
def test_what_transformers_writes(size, shards, drawn, expected, tmp_path):
    drawn.save_pretrained(tmp_path, max_shard_size=size)
    assert len(list(tmp_path.glob("model-*.safetensors"))) >= shards
    assert_loads(tmp_path, expected)


def test_shards_without_an_index_and_files_instead_of_a_folder(drawn, drawn_config, expected, tmp_path):
    folder = make.write_sharded(tmp_path / "m", drawn.config.to_dict(), make.tensors(drawn), 3)
    (folder / "model.safetensors.index.json").unlink()
    assert_loads(folder, expected)
    params = flatten(weights.load_parameters(sorted(folder.glob("*.safetensors")), drawn_config))
    np.testing.assert_array_equal(params["language_model/norm/scale"], expected["language_model/norm/scale"])


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(stored, drawn, tmp_path):
    rounded = make.random_model()
    rounded.to(stored).float()
    expected = make.expected_parameters(rounded)
    folder = make.write_scheme(tmp_path / "m", drawn, make.HUB, stored)
    for wanted in ("float32", "bfloat16", "float16"):
        assert_loads(folder, {path: array.astype(jnp.dtype(wanted)) for path, array in expected.items()}, wanted)
    kept = {str(leaf.dtype) for leaf in flatten(make.load(folder)).values()}  # without a dtype the stored one stays
    assert kept == {str(stored).removeprefix("torch.")}
    make.write_config(tmp_path / "bin", drawn.config.to_dict())
    for zipped in (True, False):  # torch files
        path = tmp_path / "bin" / "pytorch_model.bin"
        torch.save(make.hub_tensors(drawn, stored), path, _use_new_zipfile_serialization=zipped)
        assert_loads(tmp_path / "bin", expected)


def test_sharded_torch_files(drawn, expected, tmp_path):
    make.write_config(tmp_path, drawn.config.to_dict())
    state, weight_map = make.hub_tensors(drawn), {}
    names = sorted(state)
    for number in range(2):
        file = f"pytorch_model-{number + 1:05}-of-00002.bin"
        torch.save({name: state[name] for name in names[number::2]}, tmp_path / file)
        weight_map |= dict.fromkeys(names[number::2], file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_loads(tmp_path, expected)


def test_a_torch_file_with_code_is_refused(drawn_config, tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "created"), "w"))

    torch.save({"a": Attack()}, tmp_path / "pytorch_model.bin")
    refused("pytorch_model.bin", weights.load_parameters, tmp_path, drawn_config)
    assert not (tmp_path / "created").exists()


def test_what_may_be_there_besides_and_what_may_be_absent(drawn, drawn_config, expected, tmp_path):
    """Known buffers; layers behind the feature layer."""
    state, raw = make.hub_tensors(drawn), drawn.config.to_dict()
    buffers = {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    buffers["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    assert_loads(make.write(tmp_path / "more", raw, state | buffers), expected)
    unread = {name for name in state if "post_layernorm" in name or "vision_model.encoder.layers.2." in name}
    assert len(unread) == 18
    kept = {name: tensor for name, tensor in state.items() if name not in unread}
    for path, array in flatten(make.load(make.write(tmp_path / "less", raw, kept))).items():
        read = not path.startswith(("vision_tower/post_layernorm/", "vision_tower/layers_2/"))
        np.testing.assert_array_equal(array, expected[path] if read else np.zeros_like(expected[path]))
    del kept["vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias"]
    missing = r"1 missing: vision_tower.*\.encoder.layers.1.mlp.fc1.bias$"
    refused(missing, make.load, make.write(tmp_path / "too little", raw, kept))


def test_tied_embeddings(tmp_path):
    tied = make.random_model(tie=True)
    expected, raw, state = make.expected_parameters(tied), tied.config.to_dict(), make.hub_tensors(tied)
    del expected["language_model/lm_head/kernel"]
    assert_loads(make.write(tmp_path / "present", raw, state), expected)
    head = {"language_model.lm_head.weight": state.pop("language_model.lm_head.weight") + 1}
    assert_loads(make.write(tmp_path / "absent", raw, state), expected)
    refused("tie_word_embeddings", make.load, make.write(tmp_path / "different", raw, state | head))
    state["language_model.lm_head.weight"] = state.pop("language_model.model.embed_tokens.weight")
    assert_loads(make.write(tmp_path / "head", raw, state), expected)


def test_parameters_do_not_alias_the_file(drawn, tmp_path):
    folder = make.write_scheme(tmp_path / "m", drawn, make.HUB)
    params = flatten(make.load(folder, "float32"))
    before = {path: np.array(array) for path, array in params.items()}
    with open(folder / "model.safetensors", "r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(b"\xff" * size)
    for path, array in before.items():
        np.testing.assert_array_equal(np.array(params[path]), array, err_msg=path)
