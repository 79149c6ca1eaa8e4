"""Every fault of a checkpoint is reported in one line."""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lvlm_jax import weights
from lvlm_jax.errors import LVLMError
from lvlm_jax.weights.bin_file import BinFile
from lvlm_jax.weights.safetensors_file import SafetensorsFile
from tests.refusals import refused
from tests.weights import checkpoints as make

LAYERS = "language_model.model.layers."


@pytest.fixture
def load_error(drawn, drawn_config, tmp_path):
    """load_error(words, state): the error, which has these words, of loading the model's folder with these tensors."""

    def said(message, state):
        folder = make.write(tmp_path / "m", drawn.config.to_dict(), state)
        text = refused(message, weights.load_parameters, folder, drawn_config)
        assert str(folder) in text
        return text

    return said


def test_all_faults_in_one_error(drawn, load_error):
    state = make.hub_tensors(drawn)
    del state["language_model.model.norm.weight"]
    del state["vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"]
    faults = {
        "multi_modal_projector.linear_1.weight": (torch.zeros(32, 48), r"misshapen: {} \[32, 48\] instead of "),
        f"{LAYERS}0.self_attn.q_proj.weight": (torch.zeros(48), r"misshapen: {} \[48\] instead of \[48, 48\]"),
        f"{LAYERS}1.self_attn.q_proj.weight": (torch.zeros(48, 48).char(), "not floating-point: {} int8"),
        f"{LAYERS}7.input_layernorm.weight": (torch.zeros(48), "unexpected: {}"),
        "lm_head.weight": (torch.zeros(96, 48), "{}"),
    }
    message = load_error("", state | {name: tensor for name, (tensor, _) in faults.items()})
    for part in ("2 missing", "1 unexpected", "1 stored twice", "2 misshapen", "1 not floating-point"):
        assert part in message
    assert "…" not in message
    for name, (tensor, said) in faults.items():  # each alone
        load_error(said.format(name), make.hub_tensors(drawn) | {name: tensor})


def test_missing_names_follow_the_scheme_in_use_and_a_long_list_is_cut(drawn, load_error):
    state = make.tensors(drawn)
    del state["model.language_model.norm.weight"]
    load_error("1 missing: model.language_model.norm.weight", state)
    kept = {name: tensor for name, tensor in make.hub_tensors(drawn).items() if not name.startswith(LAYERS)}
    message = load_error("18 missing: ", kept)
    assert message.endswith(", ...") and message.count(LAYERS) > 1 and "…" not in message


def test_folders_and_indexes(drawn, drawn_config, tmp_path, monkeypatch):
    def load(message, folder):
        return refused(message, weights.load_parameters, folder, drawn_config)

    load("no such folder", tmp_path / "absent")
    refused("no such folder", weights.read_config, tmp_path / "absent")
    refused(r"no config\.json in", weights.read_config, tmp_path)
    message = load("no weights in", tmp_path)
    assert "model.safetensors.index.json" in message and "pytorch_model.bin" in message
    for text in ("{", "[]", "\xff", "[" * 100_000):
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
        refused(r"config\.json", weights.read_config, tmp_path)
    folder = make.write_sharded(tmp_path / "m", drawn.config.to_dict(), make.hub_tensors(drawn), 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    load("1 of 3.*model-00002-of-00003.safetensors", folder)
    index = folder / "model.safetensors.index.json"
    for text, message in (
        ('{"weight_map": {"a": "../../secret.safetensors"}}', "expected files in its own folder"),
        ("{}", "no weight_map"),
    ):
        index.write_text(text)
        load(message, folder)


def with_header(header, body=bytes(32)) -> bytes:
    """A safetensors file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def with_entry(**change) -> bytes:
    """A file of two tensors, of which the second, `a`, is described in another way."""
    entries = {"b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    entries["a"] = {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]} | change
    return with_header(entries)


WHOLE = with_entry()
DAMAGES = {
    "not a safetensors file": [b"this is not a model\n" * 50, *map(with_header, ([], b"[" * 100_000, b"\xff\xfe{}"))],
    "Git LFS pointer": [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"],
    "truncated": [b"", WHOLE[:40], WHOLE[:-5]],
    "follow the last tensor": [WHOLE + b"1234"],
    "malformed": [
        *(with_entry(data_offsets=offsets) for offsets in ([0, 16], [-16, 0], [])),  # over the other tensor, ...
        *(with_entry(shape=shape) for shape in ([5], [-2, -2], [2**40, 2**40], [4.0], "ab")),
        with_entry(dtype=["F32"]),
    ],
    "unsupported dtype F4": [with_entry(dtype="F4")],
    "no array can have": [with_entry(shape=[0, 2**64], data_offsets=[16, 16]), with_entry(shape=[1] * 65)],
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_safetensors(message, tmp_path):
    file = tmp_path / "model.safetensors"
    for content in DAMAGES[message]:
        file.write_bytes(content)
        assert str(file) in refused(message, SafetensorsFile, file)


def test_a_scalar_and_an_empty_tensor_are_read(tmp_path):
    save_file({"a": torch.tensor(3.0), "b": torch.zeros(0, 4)}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.view("a").shape == () and file.view("a") == np.float32(3)
    assert file.view("b").shape == (0, 4)


@pytest.mark.filterwarnings("ignore")  # of torch, that these kinds are new or old
def test_damaged_torch_files(drawn, drawn_config, tmp_path):
    path = make.write_config(tmp_path, drawn.config.to_dict()) / "pytorch_model.bin"
    for content in (b"", b"not a pickle", b"\x80\x02."):
        path.write_bytes(content)
        refused("pytorch_model.bin", weights.load_parameters, tmp_path, drawn_config)
    norm = "language_model.model.norm.weight"
    float8 = make.hub_tensors(drawn)
    float8[norm] = float8[norm].to(torch.float8_e4m3fn)
    for state, message in (
        ({"model": {"a": torch.ones(1)}}, "not a state dict"),
        ({3: torch.zeros(2)}, "not a state dict"),
        (float8, f"1 not floating-point: {norm} float8_e4m3fn"),
    ):
        torch.save(state, path)
        refused(message, weights.load_parameters, tmp_path, drawn_config)
    for kind, tensor in {
        "float32, sparse_coo": torch.eye(3).to_sparse(),
        "float32, sparse_csr": torch.eye(3).to_sparse_csr(),
        "quint8": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
        "float32, on the device meta": torch.zeros(3, device="meta"),
    }.items():
        torch.save({"a": tensor}, path)
        # Which of them torch itself reads without its pickle's help differs with its version.
        refused(rf"pytorch_model.bin.*(\({kind}\)|cannot read)|cannot read.*pytorch_model.bin", BinFile, path)


@pytest.mark.filterwarnings("ignore")
def test_no_damaged_byte_of_a_torch_archive_passes_for_another_number(tmp_path):
    """Damages each byte of the record table at the file's end; what is accepted equals what torch reads."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(3), "b": torch.nn.Parameter(torch.ones(3))}, path)
    content = path.read_bytes()
    accepted = 0
    for place in range(content.index(b"PK\x01\x02"), len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            file = BinFile(path)
        except LVLMError:
            continue
        accepted += 1
        for name, tensor in torch.load(path, weights_only=True).items():
            assert file.view(name).tolist() == tensor.tolist(), place
    assert accepted > 30


@pytest.mark.parametrize("reader", [BinFile, SafetensorsFile])
def test_a_pipe_is_not_waited_for(reader, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused("it is not a file", reader, tmp_path / "pipe")


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


def test_what_is_asked_of_the_hub(monkeypatch, tmp_path):
    """Torch files only without safetensors, no code, and nothing for paths that cannot be its ids."""
    asked = []

    def download(name, allow_patterns):
        asked.append(allow_patterns)
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for given in ("./absent", "/absent/folder", "a/b/c", "", "..x", "-x/y"):
        refused("no such folder", weights.resolve_checkpoint, given)
    assert weights.resolve_checkpoint(tmp_path) == tmp_path and not asked
    assert weights.resolve_checkpoint("owner/name") == tmp_path
    assert len(asked) == 2 and "model*.safetensors" in asked[0] and "pytorch_model*.bin" in asked[1]
    assert not any(pattern.endswith(".py") or pattern == "*" for patterns in asked for pattern in patterns)
    (tmp_path / "model.safetensors").touch()
    weights.resolve_checkpoint("owner/name")
    assert len(asked) == 3
    refused("is a file", weights.resolve_checkpoint, tmp_path / "model.safetensors")

    def fail(*_, **__):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    for name, hint in (("owner/name", "hub"), ("poket", r"did you mean pocket\?\)")):
        refused(f"{name} is neither a folder nor .*{hint}: no network$", weights.resolve_checkpoint, name)
