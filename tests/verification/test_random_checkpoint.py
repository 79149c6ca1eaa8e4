"""Random checkpoints out of published files: every tensor in its place, in the dtype that the files name."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.verification import tensors
from lvlm_jax.weights import model_config, names

TOOL = Path(__file__).parents[2] / "tools" / "random_checkpoint.py"


def test_a_checkpoint_with_fewer_layers(tmp_path):
    spec = importlib.util.spec_from_file_location("random_checkpoint", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    source = names.checkpoint("pocket")
    files = shutil.copytree(source, tmp_path / "files", ignore=shutil.ignore_patterns("*.safetensors"))
    tool.make(files, tmp_path / "out", layers=2)
    config = model_config(tmp_path / "out")
    result = tensors.check(tmp_path / "out", config)
    assert (config.text.num_layers, result.status) == (2, "passed"), result.words
    assert result.figures["dtypes"] == [model_config(source).hf["dtype"]]
    with pytest.raises(LVLMError, match="is there already"):
        tool.make(files, tmp_path / "out")
