"""The pairs that many tests of training share, and how the small model reads them."""

import jax
import pytest

from lvlm_jax import models
from lvlm_jax.training.data.pair_batches import Encoder, rows_of
from lvlm_jax.training.data.pair_files import read_pairs
from lvlm_jax.weights import lora
from tests.training import pair_sets


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A file of them."""
    return pair_sets.write(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def pairs(data):
    return read_pairs(data)


@pytest.fixture(scope="session")
def encoder(model):
    return Encoder(model.processor, model.config)


@pytest.fixture(scope="session")
def rows(pairs, encoder):
    return rows_of(pairs, encoder.pair, encoder, longest=95, too_long="error")


@pytest.fixture(scope="session")
def module(model):
    return models.build(model.config)


@pytest.fixture(scope="session")
def fresh(model):
    """(adapters that change nothing, frozen parameters)"""
    return lora.attach_adapters(model.params, 4, 8.0, lora.TARGETS, 0.0, jax.random.key(0))
