"""The conversion tool: one command, one line on failure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from lvlm_jax import weights
from tests.weights import checkpoints as make

ROOT = Path(__file__).resolve().parents[2]


def convert(*arguments, cwd=None):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "tools" / "convert.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)


def test_convert_an_original_checkpoint(tmp_path):
    model = make.random_model(vocab_size=90)
    rest, tower = make.split_tower(make.tensors(model))
    make.write(tmp_path / "llava", make.original_config("openai/x", 90), rest)
    make.clip_model(tower, True).save_pretrained(tmp_path / "tower")
    (tmp_path / "processor").mkdir()
    (tmp_path / "processor" / "tokenizer.json").write_text("{}")
    done = convert(
        "llava",
        "out/bf16",
        "--dtype",
        "bfloat16",
        "--vision-tower",
        "tower",
        "--processor",
        "processor",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wrote out/bf16: ") and done.stdout.count("\n") == 1
    assert weights.stored_dtype(tmp_path / "out" / "bf16") == "bfloat16"
    assert (tmp_path / "out" / "bf16" / "tokenizer.json").exists()
    loaded, report = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out" / "bf16", output_loading_info=True
    )
    assert not any(report.values())
    wanted = model.model.language_model.norm.weight.to(torch.bfloat16)
    assert torch.equal(loaded.model.language_model.norm.weight.to(torch.bfloat16), wanted)
    assert json.loads((tmp_path / "out" / "bf16" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["absent/folder/x", "out"], "no such folder"),
        (["owner/absent", "out"], "neither a folder here nor a model"),
        (["empty", "out"], "config.json"),
        (["empty"], "target"),
        (["empty", "out", "--dtype", "int4"], "int4"),
    ],
)
def test_failures_are_one_line_and_code_two(arguments, message, tmp_path):
    (tmp_path / "empty").mkdir()
    done = convert(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and message in done.stderr
    assert not (tmp_path / "out").exists()


def test_help():
    done = convert("--help")
    assert done.returncode == 0 and "--vision-tower" in done.stdout
