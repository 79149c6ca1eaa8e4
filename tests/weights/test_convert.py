"""`lvlm convert`: one command, one line on failure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from lvlm_jax.cli import convert as convert_command
from lvlm_jax.errors import LVLMError
from tests.weights import checkpoints as make

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert.py"


def convert(*arguments, cwd=None):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)


def test_convert_an_original_checkpoint(tmp_path):
    model = make.random_model(vocab_size=90)
    rest, tower = make.split_tower(make.tensors(model))
    make.write(tmp_path / "llava", make.original_config("openai/x", 90), rest)
    make.clip_model(tower, True).save_pretrained(tmp_path / "tower")
    (tmp_path / "processor").mkdir()
    (tmp_path / "processor" / "tokenizer.json").write_text("{}")
    words = "llava out/bf16 --dtype bfloat16 --vision-tower tower --processor processor"
    done = convert(*words.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wrote out/bf16: ") and done.stdout.count("\n") == 1
    out = tmp_path / "out" / "bf16"
    assert make.stored_dtypes(out) == {torch.bfloat16} and (out / "tokenizer.json").exists()
    loaded, report = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    wanted = model.model.language_model.norm.weight.to(torch.bfloat16)
    assert torch.equal(loaded.model.language_model.norm.weight.to(torch.bfloat16), wanted)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["absent/folder/x", "out"], "no such folder"),
        (["owner/absent", "out"], "neither a folder here nor a model"),
        (["empty", "out"], r"config\.json"),
        (["empty"], "target"),
        (["empty", "out", "--dtype", "int4"], "int4"),
    ],
)
def test_failures(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LVLMError, match=message) as caught:
        convert_command.main(arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_failure_is_one_line_and_code_two(tmp_path):
    done = convert("absent/folder/x", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("lvlm convert: no such folder") and done.stderr.count("\n") == 1
