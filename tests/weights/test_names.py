"""Names of models and number types on the command line, and their values for `LVLM.from_pretrained`."""

import pathlib

import jax.numpy as jnp
import numpy as np

from lvlm_jax import LVLM
from lvlm_jax.weights import names
from tests.refusals import refused


def test_names_of_checkpoints_and_number_types(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert pathlib.Path(names.checkpoint("pocket")) == names.pocket_file("checkpoint")
    assert names.checkpoint("~/model") == names.checkpoint(pathlib.Path("~/model")) == "/home/me/model"
    assert names.checkpoint("owner/name") == "owner/name"
    assert names.dtype("auto") == "float32"
    monkeypatch.setattr(names.jax, "default_backend", lambda: "gpu")
    assert names.dtype("auto") == "bfloat16"
    for given in ("float16", np.float32, jnp.bfloat16, np.dtype("float32")):
        assert names.dtype(given) is given


def test_the_pocket_model_by_its_name():
    model = LVLM.from_pretrained("pocket", dtype="auto")
    assert model.folder == names.pocket_file("checkpoint")
    assert model.params["language_model"]["embed_tokens"]["embedding"].dtype == jnp.float32
    refused("dtype 'automatic' is not supported", LVLM.from_pretrained, "pocket", dtype="automatic")
