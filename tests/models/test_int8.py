"""Products with int8 kernels against the same in float64, and what their programs look like."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.models import int8
from lvlm_jax.models.layers import linear

INPUTS, OUTPUTS = 96, 40
FEW, MANY = (2, 1, 3), (2, 3, 7)  # rows on either side of FEW_ROWS
assert 6 <= int8.FEW_ROWS < 42 and int8.NATIVE_ROWS < 42


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def kernel():
    """(int8 kernel, scales) of random weights [out, in]."""
    return int8.quantize(jnp.asarray(random((OUTPUTS, INPUTS)) / np.float32(np.sqrt(INPUTS))))


def test_every_channel_uses_the_whole_range():
    weight = random((OUTPUTS, INPUTS), 1)
    weight[3] *= 1e-3
    weight[4] = 0
    stored = jnp.asarray(weight, jnp.bfloat16)
    kernel, scale = int8.quantize(stored)
    assert kernel.dtype == jnp.int8 and scale.dtype == jnp.float32
    largest = np.abs(np.asarray(kernel, np.int32)).max(axis=1)
    np.testing.assert_array_equal(largest, [0 if row == 4 else 127 for row in range(OUTPUTS)])
    error = np.abs(np.asarray(int8.dequantize(kernel, scale)).T - np.float32(stored))
    assert (error <= np.asarray(scale)[:, None] * 0.5001).all()


@pytest.mark.parametrize("rows", [(), (1,), FEW, MANY], ids=str)
def test_products_equal_those_of_the_dequantized_kernel(kernel, rows):
    x = jnp.asarray(random((*rows, INPUTS), 2))
    expected = np.float64(x) @ np.float64(int8.dequantize(*kernel))
    for product in (int8.dot, jax.jit(int8.dot), int8._dot_by_xla, int8._dot_converted):
        got = np.asarray(product(x, kernel[0])) * np.asarray(kernel[1])
        np.testing.assert_allclose(got, expected, rtol=0, atol=5e-6)


def test_vmap(kernel):
    x = jnp.asarray(random((5, *FEW, INPUTS), 6))
    got = jax.vmap(int8.dot, in_axes=(0, None))(x, kernel[0])
    np.testing.assert_allclose(got, int8._dot_converted(x, kernel[0]), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("product", [int8.dot, int8._dot_by_xla])
@pytest.mark.parametrize("rows", [FEW, MANY], ids=str)
def test_rows_of_any_magnitude(kernel, rows, product):
    """Each row has its own step size, and a row that is not finite does not change the others."""
    x = random((*rows, INPUTS), 3)
    size = 10.0 ** np.linspace(-12, 12, x[..., 0].size).reshape(rows)[..., None]
    x = np.float32(x * size)
    x[0, 0, 0], x[-1, -1, -1] = np.nan, 0
    expected = np.float64(x) @ np.float64(int8.dequantize(*kernel))
    got = np.asarray(product(jnp.asarray(x), kernel[0])) * np.asarray(kernel[1])
    assert np.isnan(got[0, 0, 0]).all() and (got[-1, -1, -1] == 0).all()
    got, expected = (np.delete((a / size).reshape(-1, OUTPUTS), 0, axis=0) for a in (got, expected))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [FEW, MANY], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_the_converted_kernel(kernel, rows, dtype):
    x, weight = jnp.asarray(random((*rows, INPUTS), 4), dtype), random((*rows, OUTPUTS), 5)
    wide = int8.dequantize(*kernel)

    def of(product):
        return np.float32(jax.jit(jax.grad(lambda x: jnp.sum(weight * jnp.sin(product(x)))))(x))

    got = of(lambda x: int8.dot(x, kernel[0]) * kernel[1])
    expected = of(lambda x: jnp.dot(x.astype(jnp.float32), wide))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 if dtype == "float32" else 0.02)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_a_quantized_projection(kernel, dtype, tolerance):
    """Bias and adapter act on it as on a float one."""
    leaves = {"bias": random(OUTPUTS, 7), "lora_a": random((INPUTS, 2), 8), "lora_b": random((2, OUTPUTS), 9)}
    leaves = {name: jnp.asarray(leaf) * 0.1 for name, leaf in leaves.items()} | {"lora_scale": jnp.float32(2)}
    module, x = (linear(OUTPUTS, jnp.dtype(dtype), None, use_bias=True), jnp.asarray(random((*FEW, INPUTS), 10)))
    got = module.apply({"params": leaves | {"kernel_int8": kernel[0], "kernel_scale": kernel[1]}}, x)
    expected = module.apply({"params": leaves | {"kernel": int8.dequantize(*kernel)}}, x)
    assert got.dtype == dtype
    np.testing.assert_allclose(np.float32(got), np.float32(expected), rtol=0, atol=tolerance)


def chain(x, kernels):
    for kernel in kernels:
        x = jnp.tanh(int8.dot(x, kernel))
    return x


def test_programs():
    """A CPU holds one converted kernel at a time (eight of 256 KB would be 8 MB in float32), and none to decode."""
    kernels = [jnp.ones((512, 512), jnp.int8)] * 8
    for function in (chain, jax.grad(lambda x, kernels: chain(x, kernels).sum())):
        compiled = jax.jit(function).lower(jnp.ones((40, 512)), kernels).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 2 * 512 * 512 * 4
    text = jax.jit(chain).lower(jnp.ones((1, 512)), kernels).compile().as_text()
    assert "f32[512,512]" not in text and "s32[512,512]" not in text
    for platform in ("cuda", "tpu"):  # accelerators are given one product
        arguments = jnp.ones((1, 512)), jnp.ones((256, 512), jnp.int8)
        text = jax.jit(int8.dot).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.dot_general") == 1
        assert "i32" not in text.split("dot_general")[1].split("\n")[0]
