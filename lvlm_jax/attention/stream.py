"""Attention without a T x S map: blocks of queries meet blocks of keys, with a running maximum and sum.

Sources: Milakov and Gimelshein, arXiv 1805.02867; Rabe and Staats, arXiv 2112.05682; FlashAttention, arXiv 2205.14135.

Besides its result, the forward pass keeps one number per row: the logarithm of its sum of exponentials. The backward
pass recomputes each block's weights from it. So memory grows with T, and the program is two nested loops whatever T is.
A block in which no row sees a column is skipped.

The block size, and whether a kernel replaces the loops (`kernels`, and on a single CPU device `native`), depend on the
platform that a program is lowered for.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax import native
from lvlm_jax.attention import kernels, rounds
from lvlm_jax.attention.lazy_mask import LazyMask

# Block sizes: the CPU's was measured and fits its cache; the other is large enough to keep an accelerator busy.
CPU_BLOCK, BLOCK = 128, 512
FEW_ROWS, FEW_ROWS_BLOCK = 256, 64  # with fewer rows than this, smaller blocks waste less on a CPU
HIDDEN = jnp.finfo(jnp.float32).min


@jax.jit
def streaming_attention(
    query: Float[Array, "B H T D"], key: Float[Array, "B K S D"], value: Float[Array, "B K S D"], lazy_mask: LazyMask
) -> Float[Array, "B H T D"]:
    """softmax(query · keyᵀ / √D) · value over the columns that each row sees; finite for a row that sees none.

    In float32, the result equals attention over the whole map up to the order of sums. In 16 bits, products are rounded
    like those of the whole map, and sums are float32.

    Args:
        lazy_mask: which columns each row sees. If there are as many rows as columns, they must be the same tokens.
    """
    usable = kernels.usable(query, key, lazy_mask)
    if not usable:
        return _streaming_attention(query, key, value, lazy_mask)
    return jax.lax.platform_dependent(query, key, value, lazy_mask, default=_streaming_attention, **usable)


@jax.custom_vjp
def _streaming_attention(query, key, value, lazy_mask):
    return _forward(query, key, value, lazy_mask)[0]


def _forward(query, key, value, lazy_mask) -> tuple[Float[Array, "B H T D"], tuple]:
    with _named(lazy_mask):
        mixed, sums = native.attention(_by_blocks, query, key, value, lazy_mask)
    return mixed, (query, key, value, lazy_mask, mixed, sums)


def _backward(residuals: tuple, cotangent: Float[Array, "B H T D"]) -> tuple:
    with _named(residuals[3]):
        return *native.attention_gradient(_gradients_by_blocks, cotangent, *residuals), None


_streaming_attention.defvjp(_forward, _backward)


def _named(lazy_mask: LazyMask) -> contextlib.AbstractContextManager:
    """Names the operations of a native call by the average number of column blocks per row, for `planning`."""
    return rounds.name_scope(lazy_mask.average_span(CPU_BLOCK))


def _by_blocks(query, key, value, lazy_mask) -> tuple[Float[Array, "B H T D"], Float[Array, "B H T 1"]]:
    return _for_platform(_blocks, query.shape[2], query, key, value, lazy_mask)


def _gradients_by_blocks(d_result, *residuals) -> tuple:
    return _for_platform(_block_gradients, d_result.shape[2], d_result, *residuals)


def _for_platform(function, rows: int, *arguments):
    cpu = FEW_ROWS_BLOCK if rows < FEW_ROWS else CPU_BLOCK
    return jax.lax.platform_dependent(
        *arguments, cpu=functools.partial(function, cpu), default=functools.partial(function, BLOCK)
    )


def _blocks(
    block: int,
    query: Float[Array, "B H T D"],
    key: Float[Array, "B K S D"],
    value: Float[Array, "B K S D"],
    lazy_mask: LazyMask,
) -> tuple[Float[Array, "B H T D"], Float[Array, "B H T 1"]]:
    """Returns the result and, for each row, the logarithm of its sum of exponentials."""
    rows, key, value, lazy_mask = _padded(block, query, key, value, lazy_mask)
    first, last = lazy_mask.spans(block)

    def row_block(index: Int[Array, ""]) -> tuple[jax.Array, jax.Array]:
        block_rows = _rows(rows, index, block)

        def add_block(column: Int[Array, ""], state: tuple) -> tuple:
            maximum, total, mixed = state
            logits, visible = _logits(block_rows, key, lazy_mask, index, column, block)
            new_maximum = jnp.maximum(maximum, logits.max(axis=-1))
            weights = jnp.where(visible, jnp.exp(logits - new_maximum[..., None]), 0)
            decay = jnp.exp(maximum - new_maximum)
            mixed = mixed * decay[..., None] + _product("BKGTS,BKSD->BKGTD", weights, _columns(value, column, block))
            return new_maximum, total * decay + weights.sum(axis=-1), mixed

        shape = block_rows.shape[:-1]
        start = (jnp.full(shape, HIDDEN), jnp.zeros(shape), jnp.zeros(block_rows.shape, jnp.float32))
        with rounds.name_scope(lazy_mask.average_span(block)):
            maximum, total, mixed = jax.lax.fori_loop(first[index], last[index], add_block, start)
        total = jnp.where(total > 0, total, 1)
        return (mixed / total[..., None]).astype(query.dtype), (maximum + jnp.log(total))[..., None]

    mixed, sums = jax.lax.map(row_block, jnp.arange(first.shape[0]))
    return _join_blocks(mixed, query.shape[:3]), _join_blocks(sums, query.shape[:3])


def _block_gradients(
    block: int, d_result: Float[Array, "B H T D"], query, key, value, lazy_mask, mixed, sums
) -> tuple[Float[Array, "B H T D"], Float[Array, "B K S D"], Float[Array, "B K S D"]]:
    """The gradients of query, key and value, from the gradient of the result."""
    columns = key.shape[2]
    level = (d_result.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    arrays = (d_result.astype(query.dtype), level, sums)
    d_result, level, sums = (_pad_rows(block, array, key.shape[1]) for array in arrays)
    rows, key, value, lazy_mask = _padded(block, query, key, value, lazy_mask)
    first, last = lazy_mask.spans(block)

    def row_block(d_key_value: tuple, index: Int[Array, ""]) -> tuple[tuple, jax.Array]:
        block_rows, d_results, levels, total = (_rows(array, index, block) for array in (rows, d_result, level, sums))

        def add_block(column: Int[Array, ""], state: tuple) -> tuple:
            d_query, d_key, d_value = state
            logits, visible = _logits(block_rows, key, lazy_mask, index, column, block)
            weights = jnp.where(visible, jnp.exp(logits - total), 0)
            d_value = _add(d_value, _product("BKGTS,BKGTD->BKSD", weights, d_results), column)
            d_logits = _product("BKGTD,BKSD->BKGTS", d_results, _columns(value, column, block)) - levels
            d_logits = weights * d_logits * query.shape[-1] ** -0.5
            d_key = _add(d_key, _product("BKGTS,BKGTD->BKSD", d_logits, block_rows), column)
            return d_query + _product("BKGTS,BKSD->BKGTD", d_logits, _columns(key, column, block)), d_key, d_value

        start = (jnp.zeros(block_rows.shape, jnp.float32), *d_key_value)
        with rounds.name_scope(lazy_mask.average_span(block)):
            d_query, *d_key_value = jax.lax.fori_loop(first[index], last[index], add_block, start)
        return tuple(d_key_value), d_query.astype(query.dtype)

    start = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    (d_key, d_value), d_query = jax.lax.scan(row_block, start, jnp.arange(first.shape[0]))
    d_key, d_value = (array[:, :, :columns].astype(key.dtype) for array in (d_key, d_value))
    return _join_blocks(d_query, query.shape[:3]), d_key, d_value


def _padded(block, query, key, value, lazy_mask) -> tuple[Float[Array, "B K G U D"], jax.Array, jax.Array, LazyMask]:
    """Arranges the query heads of each key head side by side, and pads everything to whole blocks."""
    rows = _pad_rows(block, query, key.shape[1])
    padding = -key.shape[2] % block
    key, value = (jnp.pad(array, ((0, 0), (0, 0), (0, padding), (0, 0))) for array in (key, value))
    return rows, key, value, lazy_mask.padded(rows.shape[3] - query.shape[2], padding)


def _pad_rows(block: int, array: Float[Array, "B H T D"], key_heads: int) -> Float[Array, "B K G U D"]:
    batch, _, rows, size = array.shape
    array = array.reshape(batch, key_heads, -1, rows, size)
    return jnp.pad(array, ((0, 0), (0, 0), (0, 0), (0, -rows % block), (0, 0)))


def _join_blocks(blocks: Float[Array, "N B K G Q D"], shape: tuple[int, int, int]) -> Float[Array, "B H T D"]:
    """The rows of all blocks, in shape [B, H, T]."""
    batch, heads, rows = shape
    return jnp.moveaxis(blocks, 0, 3).reshape(batch, heads, -1, blocks.shape[-1])[:, :, :rows]


def _logits(
    rows: Float[Array, "B K G Q D"],
    key: Float[Array, "B K S D"],
    lazy_mask: LazyMask,
    index: Int[Array, ""],
    column: Int[Array, ""],
    block: int,
) -> tuple[Float[Array, "B K G Q Q"], Bool[Array, "B 1 1 Q Q"]]:
    """Logits of one block, with `HIDDEN` where a row does not see a column; and the block's mask."""
    visible = lazy_mask.part(index * block, column * block, block, block).mask()[:, None, None]
    logits = _product("BKGTD,BKSD->BKGTS", rows, _columns(key, column, block)) * rows.shape[-1] ** -0.5
    return jnp.where(visible, logits, HIDDEN), visible


def _rows(array: Float[Array, "B K G T D"], index: Int[Array, ""], block: int) -> Float[Array, "B K G Q D"]:
    return jax.lax.dynamic_slice_in_dim(array, index * block, block, axis=3)


def _columns(array: Float[Array, "B K S D"], index: Int[Array, ""], block: int) -> Float[Array, "B K Q D"]:
    return jax.lax.dynamic_slice_in_dim(array, index * block, block, axis=2)


def _add(array: Float[Array, "B K S D"], part: Float[Array, "B K Q D"], index: Int[Array, ""]) -> jax.Array:
    size = part.shape[2]
    return jax.lax.dynamic_update_slice_in_dim(array, _columns(array, index, size) + part, index * size, axis=2)


def _product(letters: str, first: jax.Array, second: jax.Array) -> jax.Array:
    """A product of operands in the dtype of the second, summed in float32."""
    exact = second.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jnp.einsum(
        letters, first.astype(second.dtype), second, precision=precision, preferred_element_type=jnp.float32
    )
