"""Attention without a T x S map: blocks of queries meet blocks of keys, with a running maximum and sum (Milakov and
Gimelshein, arXiv 1805.02867; Rabe and Staats, arXiv 2112.05682; FlashAttention, arXiv 2205.14135).

The forward pass keeps, besides its result, one number for each row: the logarithm of its sum of exponentials. The
backward pass computes every block's weights again from it. So memory grows with T, and the program is two nested loops
whatever T is. Blocks that none of their rows sees are skipped.

The platform that a program is lowered for decides on the size of blocks, and whether a kernel takes their place
(`kernels`).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.attention import kernels
from lvlm_jax.attention.sight import Sight

# Rows and columns of a block: measured on a CPU, whose cache holds it; what keeps an accelerator's units busy.
CPU_BLOCK, BLOCK = 128, 512
SHORT, SHORT_BLOCK = 256, 64  # below so many rows smaller blocks waste less on a CPU
HIDDEN = jnp.finfo(jnp.float32).min


@jax.jit
def streamed(
    query: Float[Array, "B H T D"], key: Float[Array, "B K S D"], value: Float[Array, "B K S D"], sight: Sight
) -> Float[Array, "B H T D"]:
    """softmax(query · keyᵀ / √D) · value over the columns that each row sees; finite for a row that sees none.

    float32 operands give what the whole map gives, but for the order of sums. In 16 bits products are rounded like
    those of the whole map, and sums are float32.

    Args:
        sight: which columns the rows see. As many rows as columns are taken for the same tokens.
    """
    found = kernels.fitting(query, key, sight)
    if not found:
        return _streamed(query, key, value, sight)
    return jax.lax.platform_dependent(query, key, value, sight, default=_streamed, **found)


@jax.custom_vjp
def _streamed(query, key, value, sight):
    return _forward(query, key, value, sight)[0]


def _forward(query, key, value, sight) -> tuple[Float[Array, "B H T D"], tuple]:
    mixed, sums = _for_platform(_blocks, query.shape[2], query, key, value, sight)
    return mixed, (query, key, value, sight, mixed, sums)


def _backward(kept: tuple, slope: Float[Array, "B H T D"]) -> tuple:
    return *_for_platform(_blocks_again, slope.shape[2], slope, *kept), None


_streamed.defvjp(_forward, _backward)


def _for_platform(function, rows: int, *arguments):
    cpu = SHORT_BLOCK if rows < SHORT else CPU_BLOCK
    return jax.lax.platform_dependent(
        *arguments, cpu=functools.partial(function, cpu), default=functools.partial(function, BLOCK)
    )


def _blocks(
    block: int,
    query: Float[Array, "B H T D"],
    key: Float[Array, "B K S D"],
    value: Float[Array, "B K S D"],
    sight: Sight,
) -> tuple[Float[Array, "B H T D"], Float[Array, "B H T 1"]]:
    """The result, and for each row the logarithm of its sum."""
    rows, key, value, sight = _filled(block, query, key, value, sight)
    first, last = sight.spans(block)

    def one(index: Int[Array, ""]) -> tuple[jax.Array, jax.Array]:
        own = _rows(rows, index, block)

        def meet(column: Int[Array, ""], state: tuple) -> tuple:
            top, total, mixed = state
            logits, seen = _logits(own, key, sight, index, column, block)
            higher = jnp.maximum(top, logits.max(axis=-1))
            weights = jnp.where(seen, jnp.exp(logits - higher[..., None]), 0)
            shrunk = jnp.exp(top - higher)
            mixed = mixed * shrunk[..., None] + _product("BKGTS,BKSD->BKGTD", weights, _columns(value, column, block))
            return higher, total * shrunk + weights.sum(axis=-1), mixed

        shape = own.shape[:-1]
        start = (jnp.full(shape, HIDDEN), jnp.zeros(shape), jnp.zeros(own.shape, jnp.float32))
        top, total, mixed = jax.lax.fori_loop(first[index], last[index], meet, start)
        total = jnp.where(total > 0, total, 1)
        return (mixed / total[..., None]).astype(query.dtype), (top + jnp.log(total))[..., None]

    mixed, sums = jax.lax.map(one, jnp.arange(first.shape[0]))
    return _together(mixed, query.shape[:3]), _together(sums, query.shape[:3])


def _blocks_again(
    block: int, slope: Float[Array, "B H T D"], query, key, value, sight, mixed, sums
) -> tuple[Float[Array, "B H T D"], Float[Array, "B K S D"], Float[Array, "B K S D"]]:
    """What query, key and value pull on a result of that slope."""
    columns = key.shape[2]
    level = (slope.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    alike = (slope.astype(query.dtype), level, sums)
    slope, level, sums = (_filled_rows(block, array, key.shape[1]) for array in alike)
    rows, key, value, sight = _filled(block, query, key, value, sight)
    first, last = sight.spans(block)

    def one(pulled: tuple, index: Int[Array, ""]) -> tuple[tuple, jax.Array]:
        own, slopes, levels, total = (_rows(array, index, block) for array in (rows, slope, level, sums))

        def meet(column: Int[Array, ""], state: tuple) -> tuple:
            of_rows, of_keys, of_values = state
            logits, seen = _logits(own, key, sight, index, column, block)
            weights = jnp.where(seen, jnp.exp(logits - total), 0)
            of_values = _add(of_values, _product("BKGTS,BKGTD->BKSD", weights, slopes), column)
            pull = _product("BKGTD,BKSD->BKGTS", slopes, _columns(value, column, block)) - levels
            pull = weights * pull * query.shape[-1] ** -0.5
            of_keys = _add(of_keys, _product("BKGTS,BKGTD->BKSD", pull, own), column)
            return of_rows + _product("BKGTS,BKSD->BKGTD", pull, _columns(key, column, block)), of_keys, of_values

        start = (jnp.zeros(own.shape, jnp.float32), *pulled)
        of_rows, *pulled = jax.lax.fori_loop(first[index], last[index], meet, start)
        return tuple(pulled), of_rows.astype(query.dtype)

    start = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    (of_keys, of_values), of_rows = jax.lax.scan(one, start, jnp.arange(first.shape[0]))
    of_keys, of_values = (array[:, :, :columns].astype(key.dtype) for array in (of_keys, of_values))
    return _together(of_rows, query.shape[:3]), of_keys, of_values


def _filled(block, query, key, value, sight) -> tuple[Float[Array, "B K G U D"], jax.Array, jax.Array, Sight]:
    """Rows with the query heads of a key head side by side, and everything filled up to whole blocks."""
    rows = _filled_rows(block, query, key.shape[1])
    more = -key.shape[2] % block
    key, value = (jnp.pad(array, ((0, 0), (0, 0), (0, more), (0, 0))) for array in (key, value))
    return rows, key, value, sight.padded(rows.shape[3] - query.shape[2], more)


def _filled_rows(block: int, array: Float[Array, "B H T D"], key_heads: int) -> Float[Array, "B K G U D"]:
    batch, _, rows, size = array.shape
    array = array.reshape(batch, key_heads, -1, rows, size)
    return jnp.pad(array, ((0, 0), (0, 0), (0, 0), (0, -rows % block), (0, 0)))


def _together(blocks: Float[Array, "N B K G Q D"], shape: tuple[int, int, int]) -> Float[Array, "B H T D"]:
    """The rows of all blocks, in shape [B, H, T]."""
    batch, heads, rows = shape
    return jnp.moveaxis(blocks, 0, 3).reshape(batch, heads, -1, blocks.shape[-1])[:, :, :rows]


def _logits(
    rows: Float[Array, "B K G Q D"],
    key: Float[Array, "B K S D"],
    sight: Sight,
    index: Int[Array, ""],
    column: Int[Array, ""],
    block: int,
) -> tuple[Float[Array, "B K G Q Q"], Bool[Array, "B 1 1 Q Q"]]:
    """Logits of one block, `HIDDEN` where a row does not see a column; and where it does."""
    seen = sight.part(index * block, column * block, block, block).mask()[:, None, None]
    logits = _product("BKGTD,BKSD->BKGTS", rows, _columns(key, column, block)) * rows.shape[-1] ** -0.5
    return jnp.where(seen, logits, HIDDEN), seen


def _rows(array: Float[Array, "B K G T D"], index: Int[Array, ""], block: int) -> Float[Array, "B K G Q D"]:
    return jax.lax.dynamic_slice_in_dim(array, index * block, block, axis=3)


def _columns(array: Float[Array, "B K S D"], index: Int[Array, ""], block: int) -> Float[Array, "B K Q D"]:
    return jax.lax.dynamic_slice_in_dim(array, index * block, block, axis=2)


def _add(array: Float[Array, "B K S D"], part: Float[Array, "B K Q D"], index: Int[Array, ""]) -> jax.Array:
    size = part.shape[2]
    return jax.lax.dynamic_update_slice_in_dim(array, _columns(array, index, size) + part, index * size, axis=2)


def _product(letters: str, first: jax.Array, second: jax.Array) -> jax.Array:
    """A product summed in float32 of operands in the dtype of the second."""
    exact = second.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jnp.einsum(
        letters, first.astype(second.dtype), second, precision=precision, preferred_element_type=jnp.float32
    )
