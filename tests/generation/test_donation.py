"""Caches are written in place: every byte of them that comes out of a step lies where it lay before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.generation import drivers
from lvlm_jax.generation.sampling import Sampling, sample_keys


@pytest.fixture(scope="module", params=[None, methods.CMAC()], ids=["greedy", "cmac"])
def prefilled(request, model, mixed):
    return model.prefill(mixed, request.param, 41 + 64)


def cache_bytes(state):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state.caches))


def aliased_bytes(function, *arguments):
    return function.lower(*arguments).compile().memory_analysis().alias_size_in_bytes


def test_a_decode_step_reuses_the_caches(model, prefilled):
    state, _ = prefilled
    heads, size = model.config.text.num_kv_heads, model.config.text.head_dim
    assert cache_bytes(state) >= 2 * 2 * 3 * heads * state.capacity * size * 4  # layers, key and value, batch
    tokens = jnp.zeros((3,), jnp.int32)
    assert aliased_bytes(drivers.decode_step, model.params, model.config, state, tokens) >= cache_bytes(state)


def test_the_loop_on_the_device_reuses_the_caches(model, mixed, prefilled):
    state, step = prefilled
    tokens = model.prepare(mixed).tokens
    stop = np.asarray([-1], np.int32)

    def started(state, logits):
        keys = sample_keys(0, 3)
        return drivers.begin(state, logits, tokens, Sampling.of(), keys, stop, answer_capacity=64)

    answers = jax.eval_shape(started, state, step.combined)
    limit = jnp.int32(8)
    assert aliased_bytes(drivers.run, model.params, model.config, answers, limit) >= cache_bytes(state)
