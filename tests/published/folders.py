"""Folders of files that were really published: those in the folder that LVLM_JAX_PUBLISHED names."""

import functools
import json
import os
from pathlib import Path

import pytest

from lvlm_jax import models
from lvlm_jax.weights import model_config

VARIABLE = "LVLM_JAX_PUBLISHED"
ROOT = os.environ.get(VARIABLE)
FOLDERS = sorted(path for path in Path(ROOT).expanduser().iterdir() if path.is_dir()) if ROOT else []


def raw(folder):
    """What `config.json` says; {} without one."""
    path = folder / "config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def of(*conditions):
    """A parametrisation over the folders for which all conditions hold; without any, one test that is skipped."""
    found = [pytest.param(folder, id=folder.name) for folder in FOLDERS if all(holds(folder) for holds in conditions)]
    reason = f"no such folder in {VARIABLE}" if ROOT else f"{VARIABLE} names no folder of published files"
    return pytest.mark.parametrize("folder", found or [pytest.param(None, marks=pytest.mark.skip(reason=reason))])


def configured(folder):
    """Whether there is a configuration of full weights."""
    return bool(raw(folder)) and not quantized(folder)


def quantized(folder):
    """Whether the configuration says that the weights are quantized."""
    return "quantization_config" in raw(folder)


def indexed(folder):
    """Whether there is an index of weights."""
    return any(folder.glob("*.index.json"))


def index(folder):
    """The index of weights."""
    return next(folder.glob("*.index.json"))


@functools.cache
def known(folder):
    """The configuration of a folder, and its parameters without data."""
    config = model_config(folder)
    return config, models.abstract_parameters(config)
