"""Runs a command of `lvlm` in this process; a model for commands."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from lvlm_jax.cli import main
from lvlm_jax.weights import names


def run(monkeypatch, capsys, *words):
    """Exit code, standard output and standard error of `lvlm WORDS`."""
    monkeypatch.setattr(sys, "argv", ["lvlm", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        main.main()
    printed = capsys.readouterr()
    return left.value.code, printed.out, printed.err


def refuses(monkeypatch, capsys, message, *words):
    """`lvlm WORDS` ends with code 2, nothing on stdout and one line on stderr that matches the message; the line."""
    code, out, error = run(monkeypatch, capsys, *words)
    assert (code, out) == (2, "") and error.count("\n") == 1 and error.startswith(f"lvlm {words[0]}: "), error
    assert re.search(message, error), error
    return error


def write_small(folder: Path, layers: int = 2) -> Path:
    """The pocket model cut down to a few of its decoder layers, as a checkpoint in a new folder."""
    shutil.copytree(names.pocket_file("checkpoint"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensors[name] for name in tensors if not re.search(rf"language_model.*layers\.[{layers}-9]", name)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
