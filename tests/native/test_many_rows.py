"""Products of many rows against the same in float64, with gradients; by AMX where the processor has it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import native
from lvlm_jax.models import int8, layers
from lvlm_jax.native import build, many_rows
from tests.native.test_few_rows import BY_XLA, random


def product(x, matrix, out_first=False):
    return native.few_rows_dot(x, matrix, out_first, BY_XLA[out_first])


def calls(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text().count(build.TILES)


@pytest.mark.parametrize("out_first", [False, True])
@pytest.mark.parametrize(("rows", "shape"), [(32, (32, 32)), (45, (96, 64)), (130, (64, 160))], ids=str)
def test_values_and_gradients(rows, shape, out_first):
    x, matrix = random((rows, shape[0]), 1), random(shape, 2)
    x, matrix = (jnp.asarray(part, jnp.bfloat16) for part in (x, matrix))
    held = matrix.T if out_first else matrix
    assert many_rows.fits(x, held)
    exact = np.float64(x) @ np.float64(matrix)
    np.testing.assert_allclose(np.float64(product(x, held, out_first)), exact, rtol=2**-8, atol=1e-3)
    cotangent = jnp.asarray(random(exact.shape, 3), jnp.bfloat16)
    _, back = jax.vjp(functools.partial(product, out_first=out_first), x, held)
    of_x, of_matrix = (np.float64(part) for part in back(cotangent))
    np.testing.assert_allclose(of_x, np.float64(cotangent) @ np.float64(matrix).T, rtol=2**-7, atol=2e-3)
    wanted = np.float64(x).T @ np.float64(cotangent)
    np.testing.assert_allclose(of_matrix.T if out_first else of_matrix, wanted, rtol=2**-6, atol=0.2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "shape"), [(33, (32, 32)), (70, (1120, 288))], ids=str)
def test_rows_and_an_int8_matrix(rows, shape, dtype):
    """No digit is lost before the sums."""
    x = jnp.asarray(random((rows, shape[0]), 1), dtype)
    kernel = np.random.default_rng(2).integers(-127, 128, shape[::-1], np.int8)
    result = jax.jit(int8.dot)(x, jnp.asarray(kernel))
    assert result.dtype == jnp.float32 and calls(int8.dot, x, jnp.asarray(kernel)) == build.tiles()
    exact = np.float64(x) @ np.float64(kernel).T
    error = np.sqrt(((np.float64(result) - exact) ** 2).mean() / (exact**2).mean())
    assert error < 2**-22
    ends = jnp.asarray([0.1e-29, 0.3e36, jnp.inf, jnp.nan] + [0.0] * (rows - 4), dtype)[:, None] * jnp.eye(1, shape[0])
    found = np.asarray(int8.dot(ends.astype(dtype), jnp.asarray(kernel)))
    np.testing.assert_allclose(found[:2], np.float64(ends[:2, :1]) * kernel[:, 0], rtol=1e-6)
    assert not np.isfinite(found[2:4]).any() and not found[4:].any()


def test_batches_are_more_rows_and_derivatives_go_forward():
    x, matrix = (jnp.asarray(random(shape, 5), jnp.bfloat16) for shape in ((2, 40, 64), (64, 32)))
    together = jax.vmap(product, (0, None))(x, matrix)
    np.testing.assert_array_equal(together, product(x, matrix))
    ones = jnp.ones_like(x)
    _, tangent = jax.jvp(lambda x: product(x, matrix), (x,), (ones,))
    np.testing.assert_array_equal(tangent, product(ones, matrix))


@pytest.mark.skipif(not build.tiles(), reason="no AMX here")
def test_tiles_do_what_fits_and_nothing_else():
    x, matrix = jnp.ones((64, 64), jnp.bfloat16), jnp.ones((64, 32), jnp.bfloat16)
    assert calls(product, x, matrix) == 1
    assert calls(jax.grad(lambda x: product(x, matrix).sum().astype(jnp.float32)), x) == 1
    for other in (x[:8], x[:, :48], x.astype(jnp.float32)):
        assert calls(product, other, matrix[: other.shape[1]]) == 0
    module = layers.linear(32, jnp.dtype("bfloat16"), None)
    assert calls(module.apply, {"params": {"kernel": matrix}}, x) == 1
