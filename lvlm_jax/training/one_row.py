"""A pair as one row: the prompt, the chosen answer, padding, and the rejected answer.

    column    0 ... P-1   P ... P+C-1      ... T-1   T ... T+R-1       ... T+A-1
    token     prompt      chosen answer    padding   rejected answer   padding
    position  0 ... P-1   P ... P+C-1                P ... P+R-1

The rejected answer does not see the chosen one (`Context.answer`), and its positions continue those of the prompt. So
both have the same log-probabilities as in two separate rows. The model reads the prompt once: T + A tokens instead of
2 T.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lvlm_jax.methods import CAPL, Method
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.training.forward import Sequence


def pays(config: FamilyConfig, dtype: Any, method: Method | None, length: int, answer: int) -> bool:
    """Whether a pair should be one row: answers are short, and no sliding window or method uses column numbers.

    In 16 bits, the attention kernels of accelerators do not support this mask, so pairs stay two rows.

    Args:
        length, answer: T and A, tokens of a sequence and of its answer, both with padding.
    """
    windowed = any(config.text.window(layer) is not None for layer in range(config.text.num_layers))
    known = method is None or isinstance(method, CAPL)
    return 2 * answer <= length and jnp.dtype(dtype) == jnp.float32 and known and not windowed


def joined(chosen: Sequence, rejected: Sequence, pad_token: int) -> dict[str, jax.Array]:
    """The row of a pair of sequences with one prompt and the same images, B rows of T + A columns.

    Returns:
        The fields of a sequence (`training.forward`), with `columns` of both answers, the chosen one first, and:

            rows       Int[B, 2 A]    the row that predicts each answer token
            positions  Int[B, T + A]  position of each row
            answer     Int[B, T + A]  0 the prompt and padding, 1 the chosen answer, 2 the rejected one
    """
    length, own = chosen["tokens"].shape[1], rejected["columns"]
    there = jnp.take_along_axis(rejected["answers"], own, axis=1)
    places = jnp.broadcast_to(length + jnp.arange(own.shape[1]), own.shape)
    # The first token of either answer is predicted by the last one of the prompt.
    before = jnp.concatenate([own[:, :1] - 1, places[:, :-1]], axis=1)
    arrays = {
        "tokens": _behind(chosen["tokens"], jnp.where(there, _at_columns(rejected["tokens"], own), pad_token)),
        "answers": _behind(chosen["answers"], there),
        "image_id": _behind(chosen["image_id"], jnp.where(there, 0, -1)),
        "columns": _behind(chosen["columns"], jnp.where(there, places, 0)),
        "rows": jnp.maximum(_behind(chosen["columns"] - 1, before), 0),
        "answer": _behind(chosen["answers"].astype(jnp.int32), jnp.full_like(own, 2)),
    }
    if "axes" in chosen:
        theirs = jnp.take_along_axis(rejected["axes"], own[:, None], axis=2)
        arrays["axes"] = _behind(chosen["axes"], theirs)
        return arrays | {"positions": arrays["axes"][:, 0]}
    return arrays | {"positions": _behind(jnp.broadcast_to(jnp.arange(length), chosen["tokens"].shape), own)}


def _at_columns(array: jax.Array, columns: jax.Array) -> jax.Array:
    return jnp.take_along_axis(array, columns, axis=1)


def _behind(first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.concatenate([first, second.astype(first.dtype)], axis=-1)
