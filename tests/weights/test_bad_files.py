"""What is wrong with a checkpoint is told in one line."""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lvlm_jax import models, weights
from lvlm_jax.errors import LVLMError
from lvlm_jax.weights.bin_file import BinFile
from lvlm_jax.weights.safetensors_file import SafetensorsFile
from tests.models.families import FAMILIES
from tests.weights import checkpoints as make

LAYERS = "language_model.model.layers."


@pytest.fixture(scope="module")
def model():
    return make.random_model()


@pytest.fixture(scope="module")
def config(model):
    return models.config_from_hf(model.config.to_dict())


@pytest.fixture
def state(model):
    return make.renamed(make.tensors(model), *make.HUB)


def load_error(folder, config) -> str:
    with pytest.raises(LVLMError) as caught:
        weights.load_parameters(folder, config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_all_faults_in_one_error(state, model, config, tmp_path):
    del state["language_model.model.norm.weight"]
    del state["vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"]
    state["multi_modal_projector.linear_1.weight"] = torch.zeros(32, 48)
    state["language_model.model.layers.0.self_attn.q_proj.weight"] = torch.zeros(48)
    state["language_model.model.layers.1.self_attn.q_proj.weight"] = torch.zeros(48, 48, dtype=torch.int8)
    state["language_model.model.layers.7.input_layernorm.weight"] = torch.zeros(48)
    state["lm_head.weight"] = torch.zeros(96, 48)
    message = load_error(make.write(tmp_path / "m", model.config.to_dict(), state), config)
    assert str(tmp_path / "m") in message
    for part in ("2 missing", "1 unexpected", "1 stored twice", "2 misshapen", "1 not floating-point"):
        assert part in message
    assert len(message) <= 300 and "…" not in message


@pytest.mark.parametrize(
    "name, tensor, said",
    [
        ("multi_modal_projector.linear_1.weight", torch.zeros(32, 48), "misshapen: {} [32, 48] instead of [48, 32]"),
        (f"{LAYERS}0.self_attn.q_proj.weight", torch.zeros(48), "misshapen: {} [48] instead of [48, 48]"),
        (f"{LAYERS}1.self_attn.q_proj.weight", torch.zeros(48, 48).char(), "not floating-point: {} int8"),
        (f"{LAYERS}7.input_layernorm.weight", torch.zeros(48), "unexpected: {}"),
        ("lm_head.weight", torch.zeros(96, 48), "lm_head.weight"),
    ],
)
def test_each_fault_alone(name, tensor, said, state, model, config, tmp_path):
    state[name] = tensor
    message = load_error(make.write(tmp_path / "m", model.config.to_dict(), state), config)
    assert said.format(name) in message


def test_a_long_list_is_cut(state, model, config, tmp_path):
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(LAYERS)}
    message = load_error(make.write(tmp_path / "m", model.config.to_dict(), kept), config)
    assert "18 missing: " in message and message.endswith(", ...") and message.count(LAYERS) > 1
    assert len(message) <= 300 and "…" not in message


def test_missing_names_follow_the_scheme_in_use(model, config, tmp_path):
    state = make.tensors(model)
    del state["model.language_model.norm.weight"]
    message = load_error(make.write(tmp_path / "m", model.config.to_dict(), state), config)
    assert "1 missing: model.language_model.norm.weight" in message


def test_folders(model, config, tmp_path):
    assert "no such folder" in load_error(tmp_path / "absent", config)
    with pytest.raises(LVLMError, match="no such folder"):
        weights.read_config(tmp_path / "absent")
    with pytest.raises(LVLMError, match=r"no config\.json in"):
        weights.read_config(tmp_path)
    message = load_error(tmp_path, config)
    for part in ("no weights in", "model.safetensors.index.json", "pytorch_model.bin"):
        assert part in message


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "[" * 100_000])
def test_config_that_is_not_an_object(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(LVLMError, match=r"config\.json"):
        weights.read_config(tmp_path)


def test_index(model, config, state, tmp_path):
    folder = make.write_sharded(tmp_path / "m", model.config.to_dict(), state, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    message = load_error(folder, config)
    assert "1 of 3" in message and "model-00002-of-00003.safetensors" in message
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    assert "expected files in its own folder" in load_error(folder, config)
    index.write_text("{}")
    assert "no weight_map" in load_error(folder, config)


def damaged(name: str, data: bytes) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])

    def with_header(new, body=data[8 + length :]):
        text = new if isinstance(new, bytes) else json.dumps(new).encode()
        return struct.pack("<Q", len(text)) + text + body

    whole = {
        "text": b"this is not a model\n" * 50,
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "empty": b"",
        "cut in the header": data[: 8 + length // 2],
        "cut in the data": data[:-5],
        "bytes behind": data + b"1234",
        "header is a list": with_header([]),
        "header is deep": with_header(b"[" * 100_000),
        "header is not text": with_header(b"\xff\xfe{}"),
    }
    if name in whole:
        return whole[name]
    entry = dict(header["a"])
    entry |= {
        "overlap": {"data_offsets": [0, 16]},
        "negative": {"data_offsets": [-16, 0]},
        "wrong size": {"shape": [5]},
        "negative shape": {"shape": [-2, -2]},
        "huge shape": {"shape": [2**40, 2**40]},
        "float shape": {"shape": [4.0]},
        "shape is a word": {"shape": "ab"},
        "no offsets": {"data_offsets": []},
        "dtype": {"dtype": "F4"},
        "dtype is a list": {"dtype": ["F32"]},
        "beyond NumPy": {"shape": [0, 2**64], "data_offsets": [0, 0]},
        "many axes": {"shape": [1] * 65},
    }[name]
    return with_header(header | {"a": entry})


DAMAGES = {
    "text": "not a safetensors file",
    "lfs": "Git LFS pointer",
    "empty": "truncated",
    "cut in the header": "truncated",
    "cut in the data": "truncated",
    "bytes behind": "follow the last tensor",
    "header is a list": "not a safetensors file",
    "header is deep": "not a safetensors file",
    "header is not text": "not a safetensors file",
    "overlap": "malformed",
    "negative": "malformed",
    "wrong size": "malformed",
    "negative shape": "malformed",
    "huge shape": "malformed",
    "float shape": "malformed",
    "shape is a word": "malformed",
    "no offsets": "malformed",
    "dtype": "unsupported dtype F4",
    "dtype is a list": "malformed",
    "beyond NumPy": "no array can have",
    "many axes": "no array can have",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_safetensors(name, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, file)
    whole = SafetensorsFile(file)
    # "a" must be the second tensor, so that an offset of 0 overlaps the first.
    second = max(whole.shapes, key=lambda key: whole._offsets[key])
    data = file.read_bytes()
    if second == "b":
        data = data.replace(b'"a"', b'"?"').replace(b'"b"', b'"a"').replace(b'"?"', b'"b"')
    file.write_bytes(damaged(name, data))
    with pytest.raises(LVLMError, match=DAMAGES[name]) as caught:
        SafetensorsFile(file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_a_scalar_and_an_empty_tensor_are_read(tmp_path):
    save_file({"a": torch.tensor(3.0), "b": torch.zeros(0, 4)}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.view("a").shape == () and file.view("a") == np.float32(3)
    assert file.view("b").shape == (0, 4)


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x02."])
def test_damaged_torch_file(content, model, config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    assert "pytorch_model.bin" in load_error(tmp_path, config)


def test_torch_file_that_is_no_state_dict(model, config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "pytorch_model.bin")
    assert "not a state dict" in load_error(tmp_path, config)


ODD = {
    "float32, sparse_coo": lambda: torch.eye(3).to_sparse(),
    "float32, sparse_csr": lambda: torch.eye(3).to_sparse_csr(),
    "quint8": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
    "float32, on the device meta": lambda: torch.zeros(3, device="meta"),
}


@pytest.mark.filterwarnings("ignore")  # of torch, that these kinds are new or old
@pytest.mark.parametrize("kind", ODD)
def test_torch_tensors_of_odd_kinds(kind, tmp_path):
    torch.save({"a": ODD[kind]()}, tmp_path / "odd.bin")
    with pytest.raises(LVLMError) as caught:
        BinFile(tmp_path / "odd.bin")
    message = str(caught.value)
    assert "odd.bin" in message and "\n" not in message
    # Which of them torch itself reads without its pickle's help differs with its version.
    assert f"({kind})" in message or "cannot read" in message


def test_float8_of_a_torch_file_is_named(model, config, tmp_path):
    state = make.renamed(make.tensors(model), *make.HUB)
    name = "language_model.model.norm.weight"
    state[name] = state[name].to(torch.float8_e4m3fn)
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    assert f"1 not floating-point: {name} float8_e4m3fn" in load_error(tmp_path, config)


@pytest.mark.parametrize("reader", [BinFile, SafetensorsFile])
def test_a_pipe_is_not_waited_for(reader, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LVLMError, match="it is not a file"):
        reader(tmp_path / "pipe")


ODD_FIELDS = [
    {"text_config": 3},
    {"vision_config": [1]},
    {"vision_feature_layer": "x"},
    {"text_config": {"model_type": "llama", "num_attention_heads": 0}},
    {"image_token_index": None},
    {"model_type": ["llava"]},
]


@pytest.mark.parametrize("change", ODD_FIELDS, ids=str)
def test_fields_of_other_kinds(change, model, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict() | change))
    with pytest.raises(LVLMError) as caught:
        config = weights.model_config(tmp_path)
        models.abstract_parameters(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"vocab_size": "x"}, {"model_type": 3}, {"mm_vision_tower": [1]}], ids=str)
def test_fields_of_other_kinds_of_an_original_checkpoint(change, tmp_path):
    raw = make.original_config("openai/clip-vit-large-patch14-336", 96) | {"mm_hidden_size": 1024} | change
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(LVLMError) as caught:
        weights.model_config(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pinpoints", [3, [3], [["a", "b"]], [[336]], {"a": 1}, [[0, 336]], None, []], ids=str)
def test_resolutions_of_any_shape(pinpoints, tmp_path):
    raw = FAMILIES["llava_next"].raw() | {"image_grid_pinpoints": pinpoints}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    try:
        config = weights.model_config(tmp_path)
    except LVLMError as error:
        assert "\n" not in str(error)
    else:  # transformers fills in its own
        assert pinpoints is None and config.tiling.resolutions


def test_names_that_are_no_words(tmp_path):
    torch.save({3: torch.zeros(2)}, tmp_path / "odd.bin")
    with pytest.raises(LVLMError, match="not a state dict"):
        BinFile(tmp_path / "odd.bin")


def test_torch_file_without_torch(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from lvlm_jax.errors import LVLMError\n"
        "from lvlm_jax.weights.bin_file import BinFile\n"
        "try: BinFile(sys.argv[1])\n"
        "except LVLMError as error: print(error)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "pytorch_model.bin")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "pip install torch" in done.stdout


@pytest.mark.parametrize("given", ["./absent", "/absent/folder", "a/b/c", "", "..x", "-x/y"])
def test_paths_that_cannot_be_hub_ids_never_reach_the_hub(given, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(LVLMError, match="no such folder"):
        weights.resolve_checkpoint(given)


def test_hub_failure_is_one_line(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(LVLMError, match="owner/name is neither a folder here nor .*no network$"):
        weights.resolve_checkpoint("owner/name")


def test_hub_download_takes_torch_files_only_without_safetensors(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, allow_patterns: asked.append(allow_patterns) or tmp_path
    )
    assert weights.resolve_checkpoint("owner/name") == tmp_path
    assert len(asked) == 2 and "model*.safetensors" in asked[0] and "pytorch_model*.bin" in asked[1]
    assert not any(pattern.endswith(".py") or pattern == "*" for patterns in asked for pattern in patterns)
    (tmp_path / "model.safetensors").touch()
    weights.resolve_checkpoint("owner/name")
    assert len(asked) == 3


def test_an_existing_folder_is_itself(tmp_path):
    assert weights.resolve_checkpoint(tmp_path) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(LVLMError, match="is a file"):
        weights.resolve_checkpoint(tmp_path / "file")
