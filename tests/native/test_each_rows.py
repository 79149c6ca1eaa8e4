"""Rows times a 16-bit matrix of their own, group by group: exact, differentiable, batched, left to XLA elsewhere."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import native
from lvlm_jax.native import build, each_rows
from tests.native.test_few_rows import random

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler")


def operands(dtype, out_first, rows=3, groups=(2, 3), inner=21, outer=50):
    shape = (*groups, outer, inner) if out_first else (*groups, inner, outer)
    return random((*groups, rows, inner)).astype(dtype), random(shape, 1).astype(dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("out_first", [False, True])
@pytest.mark.parametrize("rows", [1, 7, native.FEW_ROWS])
@pytest.mark.parametrize("sizes", [(64, 700), (5, 3), (700, 64)], ids=str)
def test_products(sizes, rows, out_first, dtype):
    x, matrices = operands(dtype, out_first, rows, (2, 3), *sizes)
    got = jax.jit(native.each_rows_dot, static_argnums=2)(x, matrices, out_first)
    letters = "bkrc,bkoc->bkro" if out_first else "bkrc,bkco->bkro"
    want = np.einsum(letters, np.asarray(x, np.float64), np.asarray(matrices, np.float64))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5 * sizes[0] ** 0.5, rtol=0)


def test_float32_and_many_rows_are_left_to_xla():
    for dtype, rows, count in [("bfloat16", 1, 1), ("float32", 1, 0), ("bfloat16", native.FEW_ROWS + 1, 0)]:
        program = jax.jit(native.each_rows_dot, static_argnums=2).lower(*operands(dtype, True, rows), True).compile()
        assert program.as_text().count(build.EACH) == count


@pytest.mark.parametrize("out_first", [False, True])
def test_derivatives_and_batches_are_those_of_the_product(out_first):
    x, matrices = operands("bfloat16", out_first)

    def loss(product):
        return lambda x, matrices: (product(x, matrices, out_first) ** 2).sum()

    got, want = (jax.grad(loss(f), (0, 1))(x, matrices) for f in (native.each_rows_dot, each_rows._by_xla))
    chex.assert_trees_all_close(got, want, rtol=2e-2)
    for x_axis, matrices_axis in [(1, 1), (0, None), (None, 0)]:
        given = x[0] if x_axis is None else x, matrices[0] if matrices_axis is None else matrices
        got, want = (
            jax.vmap(lambda a, b, product=product: product(a, b, out_first), (x_axis, matrices_axis))(*given)
            for product in (native.each_rows_dot, each_rows._by_xla)
        )
        chex.assert_trees_all_close(got, want, atol=1e-4)
