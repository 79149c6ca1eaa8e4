"""`lvlm convert`: one command, one line on failure."""

import json

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from lvlm_jax.cli import convert
from tests.cli.command import run
from tests.refusals import refused
from tests.weights import checkpoints as make


def test_convert_an_original_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = make.random_model(vocab_size=90)
    rest, tower = make.split_tower(make.tensors(model))
    make.write(tmp_path / "llava", make.original_config("openai/x", 90), rest)
    make.clip_model(tower, True).save_pretrained(tmp_path / "tower")
    (tmp_path / "processor").mkdir()
    (tmp_path / "processor" / "tokenizer.json").write_text("{}")
    words = "llava out/bf16 --dtype bfloat16 --vision-tower tower --processor processor"
    code, said, errors = run(monkeypatch, capsys, "convert", *words.split())
    assert code == 0, errors
    assert said.startswith("wrote out/bf16: ") and said.count("\n") == 1
    out = tmp_path / "out" / "bf16"
    assert make.stored_dtypes(out) == {torch.bfloat16} and (out / "tokenizer.json").exists()
    loaded, report = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    wanted = model.model.language_model.norm.weight.to(torch.bfloat16)
    assert torch.equal(loaded.model.language_model.norm.weight.to(torch.bfloat16), wanted)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "words, message",
    [
        ("absent/folder/x out", "no such folder"),
        ("owner/absent out", "neither a folder nor a model"),
        ("empty out", r"config\.json"),
        ("empty", "target"),
        ("empty out --dtype int4", "int4"),
    ],
)
def test_failures(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    refused(message, convert.main, words.split())
    code, _, said = run(monkeypatch, capsys, "convert", *words.split())
    assert code == 2 and said.startswith("lvlm convert: ") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
