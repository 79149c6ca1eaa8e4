"""Continuous batching for a server: rows share only the structure of the method.

Strengths, sampling, stop tokens and the answer's limit are data of a row, so requests with different values share a
batch and compile nothing. With a method, a decode step is `vmap`ped over rows. Arrays that all rows
share (parameters, the write index) have no vmap axis, so products with the weights are those of a batch.

The columns are those of `continuous`, whose functions move them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lvlm_jax.compilation import jit
from lvlm_jax.generation import continuous, decode_loop, forward, searches
from lvlm_jax.generation.continuous import PromptSize, Slots
from lvlm_jax.generation.sampling import RowSampling
from lvlm_jax.generation.state import State
from lvlm_jax.methods import Method
from lvlm_jax.models.family import FamilyConfig

TOP = 20  # how many of the most likely tokens are kept per step; the maximum in OpenAI's interface
STOPS = 16  # largest number of stop tokens of one row


def obstacle(method: Method | None) -> str | None:
    """Why a method cannot be used with separate rows; None if it can."""
    if reason := searches.obstacle(method):
        return reason
    for member in getattr(method, "members", (method,)):
        # Hidden states of a warm-up pass belong to each row and have no axis of columns.
        hidden = (
            member is not None and member.warm_up_fields == ("hidden",) and type(member).remember is Method.remember
        )
        if member is not None and not (member.independent_rows or hidden):
            return f"{member.label} depends on the columns that its tokens have"
    return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """B rows with their answers.

    Attributes:
        slots: the answers; the leaves of the method in `slots.state` have a leading axis of rows, `slots.stop` is `[B,
            STOPS]`, `slots.sampling` is a `RowSampling`.
        wants_top: rows for which the most likely tokens of every step are kept.
        top, top_logprobs: those `TOP` tokens and their log-probabilities, before temperature and filters.
    """

    slots: Slots
    wants_top: Bool[Array, "B"]
    top: Int[Array, "B M K"]
    top_logprobs: Float[Array, "B M K"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NewRow:
    """A new prompt for a row.

    Attributes:
        tokens: the prompt's token ids.
        key: the random key.
        limit: largest number of tokens in the answer.
        place: index of the row.
        stop: tokens that end the answer; -1 means none.
        sampling: how tokens are chosen, for one row.
        wants_top: whether to keep the most likely tokens of every step.
    """

    tokens: Int[Array, "1 T"]
    key: Key[Array, "1"]
    limit: Int[Array, "1"]
    place: Int[Array, "1"]
    stop: Int[Array, "N"]
    sampling: RowSampling
    wants_top: Bool[Array, "1"]


def _empty(state: State, batch: int, limit: int, vocabulary: int, size: PromptSize) -> Rows:
    """Rows without answers.

    Args:
        state: the state of any prompt that was prefilled without answer columns.
        batch: number of rows.
        limit: length of the longest answer.
        vocabulary: size of the logits.
        size: size of the largest prompt; at least that of `state`.
    """
    neutral = RowSampling.of_rows([(0.0, 0, 1.0, 1.0)] * batch)
    stop = jnp.full((batch, STOPS), -1, jnp.int32)
    slots = continuous._empty(state, jax.tree.map(jnp.asarray, neutral), stop, batch, limit, vocabulary)
    slots = continuous._widen(slots, size)
    method = jax.tree.map(lambda leaf: jnp.zeros((batch, *jnp.shape(leaf)), jnp.result_type(leaf)), state.method)
    slots = dataclasses.replace(slots, state=dataclasses.replace(slots.state, method=method))
    shape = (batch, slots.tokens.shape[1], min(TOP, vocabulary))
    return Rows(slots, jnp.zeros((batch,), bool), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))


def _place(rows: Rows, state: State, logits: Float[Array, "1 V"], row: NewRow) -> Rows:
    """Writes one prompt, prefilled without answer columns, into a row and chooses its first token."""

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[row.place].set(new)

    first = decode_loop.choose_first(state, logits, row.tokens, row.sampling, row.key, row.stop, 1)
    slots = continuous.fill(rows.slots, state, first, row.key, row.limit, row.place)
    method = jax.tree.map(lambda old, new: put(old, jnp.asarray(new)[None]), slots.state.method, state.method)
    slots = dataclasses.replace(
        slots,
        state=dataclasses.replace(slots.state, method=method),
        stop=put(slots.stop, row.stop[None]),
        sampling=jax.tree.map(put, slots.sampling, row.sampling),
    )
    top_logprobs, top = jax.lax.top_k(jax.nn.log_softmax(logits), rows.top.shape[-1])
    return dataclasses.replace(
        rows,
        slots=slots,
        wants_top=put(rows.wants_top, row.wants_top),
        top=rows.top.at[row.place, 0].set(top),
        top_logprobs=rows.top_logprobs.at[row.place, 0].set(top_logprobs),
    )


def advance(params: dict, config: FamilyConfig, rows: Rows) -> Rows:
    """Runs the newest token of every row and chooses the next token of running answers."""
    slots = rows.slots
    every, running = jnp.arange(slots.count.shape[0]), slots.running
    newest = slots.tokens[every, jnp.maximum(slots.count - 1, 0)]
    state, logits = _step(params, config, slots.state, newest)
    column = jnp.where(running, slots.count, slots.tokens.shape[1])
    top, top_logprobs = rows.top, rows.top_logprobs

    def write_top(top: jax.Array, top_logprobs: jax.Array) -> tuple[jax.Array, jax.Array]:
        logprobs, tokens = jax.lax.top_k(jax.nn.log_softmax(logits), top.shape[-1])
        return (
            top.at[every, column].set(tokens, mode="drop"),
            top_logprobs.at[every, column].set(logprobs, mode="drop"),
        )

    top, top_logprobs = jax.lax.cond((rows.wants_top & running).any(), write_top, lambda *same: same, top, top_logprobs)
    return dataclasses.replace(
        rows, slots=continuous.choose_next(slots, state, logits), top=top, top_logprobs=top_logprobs
    )


def _step(params: dict, config: FamilyConfig, state: State, tokens: Int[Array, "B"]) -> tuple[State, Array]:
    """A decode step in which every row has its own method; also returns the logits to sample from."""
    if state.method is None:
        state, step = forward.decode_step(params, config, state, tokens)
        return state, step.combined

    def batched(state: State, change: Callable[[jax.Array], jax.Array]) -> State:
        """Adds or removes the axis of the only sample; shared leaves and the method have no such axis."""

        def leaf(path: tuple, value: jax.Array) -> jax.Array:
            return value if _row_axis(path, value) is None or path[0].name == "method" else change(value)

        return jax.tree_util.tree_map_with_path(leaf, state)

    def one(state: State, token: Int[Array, ""]) -> tuple[State, Array]:
        state, step = forward.decode_step(params, config, batched(state, lambda leaf: leaf[None]), token[None])
        return batched(state, lambda leaf: leaf[0]), step.combined[0]

    axes = jax.tree_util.tree_map_with_path(_row_axis, state)
    return jax.vmap(one, in_axes=(axes, 0), out_axes=(axes, 0))(state, tokens)


def _row_axis(path: tuple, leaf: Any) -> int | None:
    """The vmap axis of a leaf; None for the start of the answers and the write index, which all rows share."""
    return None if path[0].name == "tracks" and path[-1].name in ("index", "answer_start") else 0


def _run(params: dict, config: FamilyConfig, rows: Rows, keep: Bool[Array, "B"], steps: Int[Array, ""]) -> Rows:
    """Decodes `steps` steps, or until an answer ends or all columns are used.

    Args:
        keep: rows whose answers are still needed.
    """
    slots = dataclasses.replace(rows.slots, running=rows.slots.running & keep)
    under_way = slots.running.sum()

    def unfinished(carry: tuple[Array, Rows]) -> Bool[Array, ""]:
        num_done, rows = carry
        running, state = rows.slots.running.sum(), rows.slots.state
        return (num_done < steps) & (running > 0) & (running == under_way) & (state.index < state.capacity)

    def again(carry: tuple[Array, Rows]) -> tuple[Array, Rows]:
        return carry[0] + 1, advance(params, config, carry[1])

    rows = dataclasses.replace(rows, slots=slots)
    return jax.lax.while_loop(unfinished, again, (jnp.int32(0), rows))[1]


def _compact(rows: Rows) -> Rows:
    return dataclasses.replace(rows, slots=continuous._compact(rows.slots))


def _widen(rows: Rows, size: PromptSize) -> Rows:
    return dataclasses.replace(rows, slots=continuous._widen(rows.slots, size))


empty = jit(_empty, static_argnames=("batch", "limit", "vocabulary", "size"))
place = jit(_place, donate_argnames="rows")
run = jit(_run, static_argnames="config", donate_argnames="rows")
compact = jit(_compact, donate_argnames="rows")
widen = jit(_widen, static_argnames="size")
