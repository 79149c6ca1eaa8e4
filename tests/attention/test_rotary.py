"""Rotary positions: the rotation's algebra, and the frequencies of every scaling kind against transformers."""

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lvlm_jax.attention.rotary import KINDS, RopeConfig, Rotation, frequencies, rotate
from lvlm_jax.errors import LVLMError
from lvlm_jax.models.config import DecoderConfig

SIZE = 32
FREQUENCY = frequencies(RopeConfig(theta=1000.0), SIZE)
VECTORS = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, SIZE)), jnp.float32)


def positions(*values):
    return jnp.asarray([values, values], jnp.float32)


AT = positions(0, 3, 17, 60, 41)


def turned(vectors, at):
    return rotate(vectors, Rotation.at(at, FREQUENCY))


def test_rotations_compose():
    """A cached key that is rotated by a difference of positions (also a fraction) equals the key there."""
    by = positions(5, -3, 0.25, -12.5, 7.75)
    once = turned(VECTORS, AT + by)
    np.testing.assert_allclose(turned(turned(VECTORS, AT), by), once, rtol=0, atol=2e-5)
    assert np.abs(np.asarray(once - VECTORS)).max() > 1
    np.testing.assert_array_equal(turned(VECTORS, 0 * AT), VECTORS)


def test_rotations_keep_lengths_and_see_differences_only():
    here, there = turned(VECTORS, AT), turned(VECTORS, AT + 9)
    np.testing.assert_allclose(jnp.linalg.norm(here, axis=-1), jnp.linalg.norm(VECTORS, axis=-1), rtol=1e-5)
    products = [np.einsum("btd,bsd->bts", rows, rows) for rows in (here, there)]
    np.testing.assert_allclose(products[0], products[1], rtol=0, atol=1e-3)


def test_half_precision_vectors_are_turned_in_float32():
    narrow = VECTORS.astype(jnp.bfloat16)
    found, wide = turned(narrow, AT), turned(narrow.astype(jnp.float32), AT)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, wide.astype(jnp.bfloat16))


YARN = {"beta_fast": 24.0, "beta_slow": 2.0, "truncate": False, "mscale": 0.7, "mscale_all_dim": 1.2}
SCALINGS = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 256},
    "yarn, all fields": {"factor": 16.0, "original_max_position_embeddings": 128} | YARN,
    "yarn, given factor": {"factor": 2.0, "original_max_position_embeddings": 512, "attention_factor": 1.3},
}
HEADS = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=SIZE, max_position_embeddings=1024)


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_those_of_transformers(name):
    kind = name.split(",")[0]
    theirs = LlamaConfig(**HEADS, rope_parameters={"rope_type": kind, "rope_theta": 5000.0, **SCALINGS[name]})
    module = LlamaRotaryEmbedding(theirs)
    rope = DecoderConfig.from_hf(theirs).rope
    assert rope.kind == kind
    np.testing.assert_allclose(frequencies(rope, SIZE), module.inv_freq.numpy(), rtol=2e-6)
    assert rope.scale() == pytest.approx(module.attention_scaling, rel=1e-6)


def test_every_kind_is_compared_and_an_unknown_one_named():
    assert {name.split(",")[0] for name in SCALINGS} == set(KINDS)
    with pytest.raises(LVLMError, match="'longrope' is not supported"):
        RopeConfig(kind="longrope")


def test_the_scale_multiplies_cosine_and_sine():
    plain, scaled = (Rotation.at(jnp.arange(4), FREQUENCY, scale) for scale in (1.0, 1.5))
    np.testing.assert_allclose(scaled.cosine, 1.5 * plain.cosine, rtol=1e-6)
    np.testing.assert_allclose(scaled.sine, 1.5 * plain.sine, rtol=1e-6)
