"""The random torch model whose tensors most files here write in one way or another."""

import pytest

from lvlm_jax import models
from tests.weights import checkpoints as make


@pytest.fixture(scope="module")
def drawn():
    """The torch model."""
    return make.random_model()


@pytest.fixture(scope="module")
def drawn_config(drawn):
    """Our configuration of it."""
    return models.config_from_hf(drawn.config.to_dict())
