"""Compiled programs: caches are written in place, and a decode step moves no more than it must."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.generation import decode_loop
from lvlm_jax.generation.sampling import Sampling, sample_keys
from lvlm_jax.weights.tables import flatten

pytestmark = pytest.mark.full_compiler

MOVES = ("copy", "transpose", "convert", "copy-start")
# "%copy.3 = f32[3,2,128,12]{3,2,1,0} copy(...)"; fusions carry the names of what they hold.
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = \w+\[([\d,]*)\]\S* ([\w-]+)\(", re.MULTILINE)


def moves(compiled) -> list[tuple[str, int]]:
    """Name and number of elements of everything in a compiled program that only moves or converts an array."""
    return [
        (name, int(np.prod([int(size) for size in shape.split(",") if size])))
        for name, shape, operation in INSTRUCTION.findall(compiled.as_text())
        if operation in MOVES or (operation == "fusion" and name.split("_")[0].startswith(MOVES))
    ]


SEVI = pytest.param(methods.SEVI(start_layer=0), id="sevi", marks=pytest.mark.slow)


@pytest.mark.parametrize("method", [pytest.param(None, id="greedy"), pytest.param(methods.CMAC(), id="cmac"), SEVI])
def test_a_decode_step_moves_no_weight_and_no_cache(model, mixed, method):
    """No copy, transposition or conversion; all caches keep their memory."""
    state, first = model.prefill(mixed, method, 41 + 64)
    step = decode_loop.decode_step.lower(model.params, model.config, state, jnp.zeros((3,), jnp.int32)).compile()
    language_model = flatten(model.params["language_model"])
    sizes = {leaf.size for path, leaf in language_model.items() if path.endswith(("kernel", "embedding"))}
    sizes |= {block.key.size for cache in state.caches for block in (cache.prefix, *cache.own) if block is not None}
    assert [move for move in moves(step) if move[1] in sizes] == []
    assert moves(step), "the pattern finds nothing at all: has the text of programs changed?"
    held, text = sum(leaf.nbytes for leaf in jax.tree.leaves(state.caches)), model.config.text
    assert held >= 2 * 2 * 3 * text.num_kv_heads * state.capacity * text.head_dim * 4  # layers, key and value, batch
    assert step.memory_analysis().alias_size_in_bytes >= held
    if method is not None and method.label == "SEVI":
        return
    tokens, stop = model.prepare(mixed).tokens, np.asarray([-1], np.int32)

    def started(state, logits):
        return decode_loop.begin(state, logits, tokens, Sampling.of(), sample_keys(0, 3), stop, answer_capacity=64)

    answers = jax.eval_shape(started, state, first.combined)
    loop = decode_loop.run.lower(model.params, model.config, answers, jnp.int32(8)).compile()
    assert loop.memory_analysis().alias_size_in_bytes >= held
