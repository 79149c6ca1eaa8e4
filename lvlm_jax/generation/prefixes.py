"""Computes the common beginning of several prompts once: their images and the words before and between them.

Two prompts have a common beginning if all of their images are equal, and all tokens up to the end of the last image.
The rest of each prompt is run by itself, after the cached columns of the beginning have been moved to its own columns:

    cached    . . B <1 1 1 1> q q q         columns of one prompt
    another   . . . B <1 1 1 1> r r         the same beginning, one column to the right
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from lvlm_jax.attention import LayerCache
from lvlm_jax.compilation import jit
from lvlm_jax.generation import chunks
from lvlm_jax.generation.state import Prompt
from lvlm_jax.methods import Method
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.models.pictures import round_up_to_bucket
from lvlm_jax.processors.layout import Inputs


class Beginnings(NamedTuple):
    """The cached keys and values of U beginnings of prompts.

    Attributes:
        caches: keys and values of every layer, `Float[U, K, S, D]`.
        first: the column of the first token of each beginning, `Int[U]`.
    """

    caches: tuple[LayerCache, ...]
    first: np.ndarray


@dataclasses.dataclass
class Recent:
    """A memory of the beginning of the last prompt.

    Attributes:
        key: the beginning's key, from `beginnings`.
        latest: the beginning's cached columns, as soon as two successive prompts have had it; else None.
    """

    key: bytes = b""
    latest: Beginnings | None = None


def digest(parts: Iterable[Any]) -> bytes:
    """A key for arrays, texts and numbers: equal content has an equal key."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            hasher.update(f"{part.dtype}{part.shape}".encode())
            hasher.update(np.ascontiguousarray(part).data)
        else:
            hasher.update(repr(part).encode())
    return hasher.digest()


def shares(config: FamilyConfig, method: Method | None) -> bool:
    """Whether the cached beginning of a prompt depends neither on the rest of the prompt nor on the method."""
    plain = method is None or (chunks.method_obstacle(method) is None and method.tower_edit() is None)
    return plain and not config.reads_instruction


def split(inputs: Inputs, edited: int) -> int:
    """The column from which each prompt runs by itself; no earlier row is edited or comes after the last image."""
    return inputs.tokens.shape[1] - max(inputs.tail_rows, edited)


def beginnings(inputs: Inputs, before: int) -> list[bytes]:
    """A key for each prompt's beginning, which ends with its last image, or else at the column `before`."""
    keys, image = [], 0
    for tokens, ids, end in zip(inputs.tokens, inputs.image_id, _ends(inputs, before), strict=True):
        valid = ids >= 0
        parts: list[Any] = [tokens[:end][valid[:end]], ids[:end][valid[:end]]]
        if (ids > 0).any():
            count = int(ids.max())
            shown = np.arange(image, image + count)
            parts += [inputs.pixels[np.isin(inputs.owner, shown)]]
            parts += [] if inputs.grids is None else [inputs.grids[shown]]
            image += count
        keys.append(digest(parts))
    return keys


def alike(inputs: Inputs, before: int) -> tuple[np.ndarray, np.ndarray] | None:
    """One sample for each different beginning, and for each sample the index of its beginning.

    None if sharing does not pay. It pays if there are at least twice as many different prompts as beginnings; copies
    that fill a batch do not count.
    """
    keys = beginnings(inputs, before)
    different = {(key, row.tobytes()) for key, row in zip(keys, inputs.tokens, strict=True)}
    if 2 * len(set(keys)) > len(different):
        return None
    rows = {key: row for row, key in enumerate(keys)}
    place = {key: kind for kind, key in enumerate(rows)}
    return np.array(list(rows.values())), np.array([place[key] for key in keys])


def before(
    params: dict, config: FamilyConfig, main: Prompt, inputs: Inputs, edited: int, at_a_time: int, recent: Recent | None
) -> Iterator[tuple[LayerCache, ...] | None] | None:
    """The prefix of prompts that share beginnings with each other or with the previous prompt, for `chunks.Prefill`.

    Args:
        edited: how many of the last rows a method edits.
        at_a_time: number of rows that run at once.

    Returns:
        An iterator as `chunks.Prefill` takes it; None if nothing is shared.
    """
    end = split(inputs, edited)
    if end <= 0:
        return None
    if inputs.batch > 1:
        if (groups := alike(inputs, end)) is None:
            return None
        rows, kinds = groups
        return _each(run(params, config, main, inputs, rows, end, at_a_time), inputs, kinds, end)
    if recent is None:
        return None
    (key,) = beginnings(inputs, end)
    if key != recent.key:
        recent.key, recent.latest = key, None
        return None
    alone = np.zeros(1, np.int32)
    if recent.latest is not None:
        return iter((behind(recent.latest, inputs, alone, end),))
    return _each(run(params, config, main, inputs, alone, end, at_a_time), inputs, alone, end, recent)


def _each(
    work: Iterator[Beginnings], inputs: Inputs, kinds: Int[np.ndarray, "B"], end: int, recent: Recent | None = None
) -> Iterator[tuple[LayerCache, ...] | None]:
    newest = next(work)
    for more in work:
        yield None
        newest = more
    if recent is not None:
        recent.latest = newest
    yield behind(newest, inputs, kinds, end)


def run(
    params: dict, config: FamilyConfig, main: Prompt, inputs: Inputs, rows: np.ndarray, before: int, at_a_time: int
) -> Iterator[Beginnings]:
    """Yields the beginnings of some samples after each chunk of rows; the last value is complete."""
    rows = np.pad(rows, (0, round_up_to_bucket(len(rows), 1) - len(rows)), mode="edge")
    first = _first(inputs)[rows]
    chosen = _chosen(main, rows, _ends(inputs, before)[rows])
    total, least = inputs.tokens.shape[1], int(first.min())
    for caches in chunks.prefix(params, config, chosen, total, least, at_a_time, inputs.image_count):
        yield Beginnings(caches, first)


def behind(stored: Beginnings, inputs: Inputs, kinds: Int[np.ndarray, "B"], before: int) -> tuple[LayerCache, ...]:
    """The first `before` columns of prompts; `kinds` has the index of each prompt's beginning in `stored`."""
    columns = np.arange(before)[None] - _first(inputs)[:, None] + stored.first[kinds][:, None]
    places = np.clip(columns, 0, stored.caches[0].prefix.length - 1).astype(np.int32)  # anywhere for padding
    return _moved(stored.caches, kinds.astype(np.int32), places)


def _first(inputs: Inputs) -> Int[np.ndarray, "B"]:
    return (inputs.image_id >= 0).argmax(axis=1)


def _ends(inputs: Inputs, before: int) -> Int[np.ndarray, "B"]:
    """The column after the last image of each prompt; `before` for a prompt without images."""
    in_image = inputs.image_id > 0
    return np.where(in_image.any(axis=1), inputs.image_id.shape[1] - in_image[:, ::-1].argmax(axis=1), before)


@jit
def _chosen(prompt: Prompt, rows: jax.Array, ends: jax.Array) -> Prompt:
    """Some prompts up to their ends. Later columns are hidden from all rows, but a NaN in them would still spread."""
    before_end = jnp.arange(prompt.image_id.shape[1]) < ends[:, None]
    axes = None if prompt.axes is None else prompt.axes[:, rows]
    embeddings = jnp.where(before_end[..., None], prompt.embeddings[rows], 0)
    return Prompt(embeddings, jnp.where(before_end, prompt.image_id[rows], -1), axes)


@jit
def _moved(caches: tuple[LayerCache, ...], kinds: jax.Array, places: jax.Array) -> tuple[LayerCache, ...]:
    # Keys are rotated by the positions of tokens, not of columns, so they can be moved.
    def moved(block: jax.Array) -> jax.Array:
        return jnp.take_along_axis(block[kinds], places[:, None, :, None], axis=2)

    return jax.tree.map(moved, caches)
