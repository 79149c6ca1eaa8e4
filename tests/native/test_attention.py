"""Native attention and its gradient: exact for odd sizes and masks, left to XLA elsewhere, counted by the planner."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import native
from lvlm_jax.attention.lazy_mask import LazyMask
from lvlm_jax.attention.stream import streaming_attention
from lvlm_jax.native import build
from lvlm_jax.planning import products
from tests.native.test_few_rows import random
from tests.parallel.simulated import in_a_process

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler")
TARGETS = (build.ATTENTION, build.ATTENTION_GRADIENT)


def sight(rows, columns, window=None, images=False, answers=False, causal=True, pictures=None, batch=2):
    """A mask of the last rows over columns; the first sample is padded on the left, the last one on the right.

    `pictures`: two images that are "apart" (each sees itself, text every or one of them) or "crossing".
    """
    place = np.arange(columns)
    valid = np.stack([place >= columns // 7] + [place < columns - columns // 9] * (batch - 1))
    if not causal:
        return LazyMask.everywhere(rows, jnp.asarray(valid))
    image = jnp.asarray(np.isin(6 * place // columns, (1, 3)) & valid) if images else None
    answer = np.maximum(0, 9 * place // columns - 6)  # images belong to the prompt, so behind them
    answer = jnp.asarray(np.stack([answer] * batch)) if answers else None
    mask = LazyMask.of(jnp.arange(columns - rows, columns), jnp.asarray(valid), window, image, answer)
    number = jnp.asarray(np.where(np.isin(6 * place // columns, (1, 3)) & valid, 6 * place // columns, 0))
    if pictures == "crossing":
        return mask.crossing(jnp.where(place % 3 > 0, number, 0))
    if pictures == "apart":
        text = jnp.asarray(np.arange(batch)[:, None] * (place > 4 * columns // 5))  # the second sample's sees image 1
        return mask.of_pictures(number, jnp.where(number > 0, number, text)[:, columns - rows :])
    return mask


def reference(query, key, value, mask, d_result):
    """The result and the gradients in float64: softmax over the whole map, zeros for rows that see nothing."""
    query, key, value, d_result = (np.asarray(array, np.float64) for array in (query, key, value, d_result))
    groups, scale = query.shape[1] // key.shape[1], query.shape[-1] ** -0.5
    keys, values = (np.repeat(array, groups, axis=1) for array in (key, value))
    mask = np.broadcast_to(np.asarray(mask.mask())[:, None], (*query.shape[:3], key.shape[2]))
    exponentials = np.where(mask, np.exp(np.einsum("bhtd,bhsd->bhts", query, keys) * scale), 0)
    weights = exponentials / np.where(mask.any(-1, keepdims=True), exponentials.sum(-1, keepdims=True), 1)
    result = weights @ values
    d_weights = d_result @ values.swapaxes(2, 3)
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
    d_key, d_value = d_logits.swapaxes(2, 3) @ query, weights.swapaxes(2, 3) @ d_result
    shape = (key.shape[0], key.shape[1], groups, *key.shape[2:])
    return result, d_logits @ keys, d_key.reshape(shape).sum(2), d_value.reshape(shape).sum(2)


def with_gradients(query, key, value, mask, d_result):
    result, transposed = jax.vjp(lambda *arrays: streaming_attention(*arrays, mask), query, key, value)
    return result, *transposed(d_result)


CASES = {  # heads, key heads, rows, columns, size of a head, mask
    "as many rows as columns": (4, 4, 272, 272, 24, {}),
    "behind a prefix": (6, 2, 100, 333, 64, {}),
    "one channel": (2, 1, 49, 97, 1, {}),
    "odd sizes": (3, 3, 65, 65, 7, {}),
    "wide heads, window": (2, 1, 205, 205, 128, dict(window=50)),
    "whole images, window": (2, 2, 300, 300, 16, dict(images=True, window=40)),
    "two answers": (2, 2, 301, 301, 40, dict(answers=True)),
    "images apart": (4, 2, 200, 230, 24, dict(pictures="apart", answers=True)),
    "images crossing": (4, 2, 200, 230, 24, dict(pictures="crossing", window=60)),
    "patches": (2, 2, 145, 145, 80, dict(causal=False)),
}


@pytest.mark.parametrize(("heads", "key_heads", "rows", "columns", "size", "how"), CASES.values(), ids=CASES)
def test_results_and_gradients(heads, key_heads, rows, columns, size, how):
    mask = sight(rows, columns, **how)
    shapes = [(2, heads, rows, size), *[(2, key_heads, columns, size)] * 2, (2, heads, rows, size)]
    *arrays, d_result = (random(shape, seed) for seed, shape in enumerate(shapes))
    got = jax.jit(with_gradients)(*arrays, mask, d_result)
    for ours, exact in zip(got, reference(*arrays, mask, d_result), strict=True):
        np.testing.assert_allclose(ours, exact, atol=1e-5)


def test_16_bits_are_computed_in_float32():
    mask, shapes = sight(130, 130), [(2, 4, 130, 24), *[(2, 2, 130, 24)] * 2, (2, 4, 130, 24)]
    *arrays, d_result = (random(shape, seed).astype("bfloat16") for seed, shape in enumerate(shapes))
    got = jax.jit(with_gradients)(*arrays, mask, d_result)
    for ours, exact in zip(got, reference(*arrays, mask, d_result), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(ours, np.float32), exact, atol=2e-2, rtol=2e-2)


def test_one_device_runs_it_and_several_divide_loops():
    arrays, mask = [random((2, 2, 130, 8), seed) for seed in range(4)], sight(130, 130)
    program = jax.jit(with_gradients).lower(*arrays[:3], mask, arrays[3]).compile()
    assert [program.as_text().count(f'"{target}"') for target in TARGETS] == [1, 1]
    (divided,) = in_a_process("parallel.attention_on_devices", count=2)
    assert divided["calls"] == [0, 0]
    assert divided["largest_difference"] < 1e-5


def test_a_batch_of_batches_is_left_to_xla():
    arrays, mask = [random((3, 2, 2, 70, 8), seed) for seed in range(3)], sight(70, 70)
    got = jax.vmap(lambda *arrays: streaming_attention(*arrays, mask))(*arrays)
    for index in range(3):
        own = streaming_attention(*(array[index] for array in arrays), mask)
        np.testing.assert_allclose(got[index], own, atol=1e-5)


def test_the_planner_counts_its_products():
    """With 256 rows in blocks of 128, a row sees 1.5 blocks on average; the gradient also needs `d_result · result`."""
    arrays, mask = [random((2, 2, 256, 8), seed) for seed in range(4)], sight(256, 256)
    program = jax.jit(with_gradients).lower(*arrays[:3], mask, arrays[3]).compile()
    size = 2 * 2 * 256 * 8
    assert products.flops_of(program) == (4 + 10) * size * 1.5 * 128 + 2 * size
