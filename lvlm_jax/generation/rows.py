"""Continuous batching where a row shares nothing with the others but the method's structure: for a server.

Strengths, sampling, stop tokens and the longest answer are data of a row, so that requests with other ones go into the
same batch and compile nothing. A decode step is `vmap`ped over rows where there is a method; what rows have in common
(parameters, columns, the write index) has no such axis, so the products over the weights are those of a batch.

The columns are those of `continuous`, whose functions move them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lvlm_jax.compilation import jit
from lvlm_jax.generation import continuous, drivers, forward, searches
from lvlm_jax.generation.continuous import Size, Slots
from lvlm_jax.generation.sampling import RowSampling
from lvlm_jax.generation.state import State
from lvlm_jax.methods import Method
from lvlm_jax.models.family import FamilyConfig

TOP = 20  # most likely tokens that are kept of a step, as many as OpenAI's interface can ask for
STOPS = 16  # tokens that may end the answer of one row


def obstacle(method: Method | None) -> str | None:
    """Why answers cannot be written in rows; None where they can."""
    if reason := searches.obstacle(method):
        return reason
    for member in getattr(method, "members", (method,)):
        # The hidden states that a warm-up pass finds are each row's own here, and have no axis of columns.
        hidden = (
            member is not None and member.warm_up_fields == ("hidden",) and type(member).remember is Method.remember
        )
        if member is not None and not (member.independent_rows or hidden):
            return f"{member.label} depends on the columns that its tokens have"
    return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """B rows.

    Attributes:
        slots: their answers; the leaves of the method in `slots.state` have a leading axis of rows, `slots.stop` is
            `[B, STOPS]`, `slots.sampling` a `RowSampling`.
        wanted: rows that want the most likely tokens of every step.
        top, top_logprobs: those tokens and their log-probabilities, `TOP` of each, before temperature and filters.
    """

    slots: Slots
    wanted: Bool[Array, "B"]
    top: Int[Array, "B M K"]
    top_logprobs: Float[Array, "B M K"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Row:
    """What a row is given with its prompt.

    Attributes:
        tokens: the prompt's token ids.
        key: the random key.
        limit: how many tokens may be chosen.
        place: which row.
        stop: tokens that end the answer; -1 is none.
        sampling: how tokens are chosen, of one row.
        wanted: whether the most likely tokens of every step are kept.
    """

    tokens: Int[Array, "1 T"]
    key: Key[Array, "1"]
    limit: Int[Array, "1"]
    place: Int[Array, "1"]
    stop: Int[Array, "N"]
    sampling: RowSampling
    wanted: Bool[Array, "1"]


def _empty(state: State, batch: int, limit: int, vocabulary: int, size: Size) -> Rows:
    """Rows without answers.

    Args:
        state: of any prompt, prefilled without columns for an answer.
        batch: how many rows.
        limit: longest answer.
        vocabulary: of the logits.
        size: of the largest prompt; at least that of `state`.
    """
    neutral = RowSampling.of_rows([(0.0, 0, 1.0, 1.0)] * batch)
    stop = jnp.full((batch, STOPS), -1, jnp.int32)
    slots = continuous._empty(state, jax.tree.map(jnp.asarray, neutral), stop, batch, limit, vocabulary)
    slots = continuous._widen(slots, size)
    method = jax.tree.map(lambda leaf: jnp.zeros((batch, *jnp.shape(leaf)), jnp.result_type(leaf)), state.method)
    slots = dataclasses.replace(slots, state=dataclasses.replace(slots.state, method=method))
    kept = (batch, slots.tokens.shape[1], min(TOP, vocabulary))
    return Rows(slots, jnp.zeros((batch,), bool), jnp.zeros(kept, jnp.int32), jnp.zeros(kept, jnp.float32))


def _place(rows: Rows, state: State, logits: Float[Array, "1 V"], row: Row) -> Rows:
    """Puts one prompt that was prefilled without columns for an answer into a row, and chooses its first token."""

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[row.place].set(new)

    first = drivers.choose_first(state, logits, row.tokens, row.sampling, row.key, row.stop, 1)
    slots = continuous.filled(rows.slots, state, first, row.key, row.limit, row.place)
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
        wanted=put(rows.wanted, row.wanted),
        top=rows.top.at[row.place, 0].set(top),
        top_logprobs=rows.top_logprobs.at[row.place, 0].set(top_logprobs),
    )


def advance(params: dict, config: FamilyConfig, rows: Rows) -> Rows:
    """Runs the newest token of every row, and chooses the next token of those whose answers are under way."""
    slots = rows.slots
    every, running = jnp.arange(slots.count.shape[0]), slots.running
    newest = slots.tokens[every, jnp.maximum(slots.count - 1, 0)]
    state, logits = _step(params, config, slots.state, newest)
    column = jnp.where(running, slots.count, slots.tokens.shape[1])
    top, top_logprobs = rows.top, rows.top_logprobs

    def kept(top: jax.Array, top_logprobs: jax.Array) -> tuple[jax.Array, jax.Array]:
        logprobs, tokens = jax.lax.top_k(jax.nn.log_softmax(logits), top.shape[-1])
        return (
            top.at[every, column].set(tokens, mode="drop"),
            top_logprobs.at[every, column].set(logprobs, mode="drop"),
        )

    top, top_logprobs = jax.lax.cond((rows.wanted & running).any(), kept, lambda *same: same, top, top_logprobs)
    return dataclasses.replace(rows, slots=continuous.chosen(slots, state, logits), top=top, top_logprobs=top_logprobs)


def _step(params: dict, config: FamilyConfig, state: State, tokens: Int[Array, "B"]) -> tuple[State, Array]:
    """A decode step in which every row has a method of its own, with the logits to sample from."""
    if state.method is None:
        state, step = forward.decode_step(params, config, state, tokens)
        return state, step.combined

    def batched(state: State, change: Callable[[jax.Array], jax.Array]) -> State:
        """The state with or without the axis of its only sample, which shared leaves and the method never have."""

        def leaf(path: tuple, value: jax.Array) -> jax.Array:
            return value if _row_axis(path, value) is None or path[0].name == "method" else change(value)

        return jax.tree_util.tree_map_with_path(leaf, state)

    def one(state: State, token: Int[Array, ""]) -> tuple[State, Array]:
        state, step = forward.decode_step(params, config, batched(state, lambda leaf: leaf[None]), token[None])
        return batched(state, lambda leaf: leaf[0]), step.combined[0]

    axes = jax.tree_util.tree_map_with_path(_row_axis, state)
    return jax.vmap(one, in_axes=(axes, 0), out_axes=(axes, 0))(state, tokens)


def _row_axis(path: tuple, leaf: Any) -> int | None:
    """Where the answers begin and the next token goes is the same for all rows."""
    return None if path[0].name == "tracks" and path[-1].name in ("index", "answer_start") else 0


def _run(params: dict, config: FamilyConfig, rows: Rows, keep: Bool[Array, "B"], steps: Int[Array, ""]) -> Rows:
    """Decodes so many steps, or until an answer has ended or all columns are used.

    Args:
        keep: rows whose answers are still wanted.
    """
    slots = dataclasses.replace(rows.slots, running=rows.slots.running & keep)
    under_way = slots.running.sum()

    def unfinished(carry: tuple[Array, Rows]) -> Bool[Array, ""]:
        done, rows = carry
        running, state = rows.slots.running.sum(), rows.slots.state
        return (done < steps) & (running > 0) & (running == under_way) & (state.index < state.capacity)

    def again(carry: tuple[Array, Rows]) -> tuple[Array, Rows]:
        return carry[0] + 1, advance(params, config, carry[1])

    rows = dataclasses.replace(rows, slots=slots)
    return jax.lax.while_loop(unfinished, again, (jnp.int32(0), rows))[1]


def _compact(rows: Rows) -> Rows:
    return dataclasses.replace(rows, slots=continuous._compact(rows.slots))


def _widen(rows: Rows, size: Size) -> Rows:
    return dataclasses.replace(rows, slots=continuous._widen(rows.slots, size))


empty = jit(_empty, static_argnames=("batch", "limit", "vocabulary", "size"))
place = jit(_place, donate_argnames="rows")
run = jit(_run, static_argnames="config", donate_argnames="rows")
compact = jit(_compact, donate_argnames="rows")
widen = jit(_widen, static_argnames="size")
