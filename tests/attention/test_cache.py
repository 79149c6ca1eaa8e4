"""Blocks of keys and values: the result of a write, its cost in 16 bits, and its derivative."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.attention.cache import Block
from lvlm_jax.models.layers import Embed

SHAPE, NEW, TABLE = (2, 3, 40, 8), (2, 3, 4, 8), (50, 8)


def random(shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_write_changes_its_columns_alone(dtype):
    key, value, new = random(SHAPE, dtype), random(SHAPE, dtype, 1), random(NEW, dtype, 2)
    got = jax.jit(Block.write)(Block(key, value), Block(new, -new), 30)
    chex.assert_trees_all_equal(got, Block(key.at[:, :, 30:34].set(new), value.at[:, :, 30:34].set(-new)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_nothing_of_16_bits_is_converted_as_a_whole(dtype):
    """Decode steps make no float32 copy of the cache or of the embeddings."""
    table = random(TABLE, dtype)

    def step(index, carry):
        block, table = carry
        row = Embed(*TABLE, dtype=dtype).apply({"params": {"embedding": table}}, index[None])
        one = jnp.broadcast_to(row, (2, 3, 1, 8))
        return block.write(Block(one, one), index), table

    def loop(block, table):
        return jax.lax.fori_loop(0, 40, step, (block, table))[0]

    block = Block(random(SHAPE, dtype), random(SHAPE, dtype, 1))
    program = jax.jit(loop, donate_argnums=0).lower(block, table).compile().as_text()
    for shape in (SHAPE, TABLE):
        assert f"f32[{','.join(map(str, shape))}]" not in program


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_derivatives(dtype):
    block, new = random(SHAPE, dtype), random(NEW, dtype, 1)
    weights = random(SHAPE, "float32", 2)

    def loss(block, new):
        return (Block(block, block).write(Block(new, new), jnp.int32(7)).value * weights).sum()

    kept, written = jax.grad(loss, (0, 1))(block, new)
    np.testing.assert_allclose(kept, weights.at[:, :, 7:11].set(0).astype(dtype))
    np.testing.assert_allclose(written, weights[:, :, 7:11].astype(dtype))
    tokens = jnp.array([3, 1, 3])
    embed = Embed(*TABLE, dtype=dtype)
    grad = jax.grad(lambda table: embed.apply({"params": {"embedding": table}}, tokens).sum())(random(TABLE, dtype))
    np.testing.assert_array_equal(grad[:, 0], np.bincount(tokens, minlength=TABLE[0]))
