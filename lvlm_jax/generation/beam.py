"""Beam search: the N best partial answers of every sample, as B·N rows of one batch.

Scores, stop tokens, length penalty and the end of the search are those of transformers (`early_stopping=False`). A
sample keeps its N best finished answers by sum of log-probabilities / length^penalty. Its search stops when its best
running beam, if it ended now, would be no better than the worst of these answers.

    row b·N + n    beam n of sample b; all rows of a sample share its prompt, so reordering copies only later columns

`Hypotheses` knows nothing of models or caches: a search passes in the scores of continuations, and runs the
continuations that are chosen.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.compilation import jit
from lvlm_jax.generation import forward
from lvlm_jax.generation.state import State
from lvlm_jax.models.family import FamilyConfig

RULED_OUT = -1e9  # score of a beam that must not win; finite, so that sums and differences stay finite


class Finished(NamedTuple):
    """The best answer of every sample; fields as in `decode_loop.Answers`."""

    tokens: Int[Array, "B M"]
    logprobs: Float[Array, "B M"]
    length: Int[Array, "B"]
    finished: Bool[Array, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hypotheses:
    """N running answers and N finished answers per sample.

    Attributes:
        tokens, logprobs, scores: the running beams, best first; buffers of M columns.
        kept_tokens, kept_logprobs, kept_length, kept_scores: finished answers, best first; scores are divided by
            length^penalty.
        is_kept: which of the N places for finished answers are filled.
        open: samples whose search has not ended.
        count: number of tokens in every running beam.
    """

    tokens: Int[Array, "B N M"]
    logprobs: Float[Array, "B N M"]
    scores: Float[Array, "B N"]
    kept_tokens: Int[Array, "B N M"]
    kept_logprobs: Float[Array, "B N M"]
    kept_length: Int[Array, "B N"]
    kept_scores: Float[Array, "B N"]
    is_kept: Bool[Array, "B N"]
    open: Bool[Array, "B"]
    count: Int[Array, ""]

    @classmethod
    def empty(cls, batch: int, beams: int, answer_capacity: int) -> "Hypotheses":
        """The hypotheses before the first token. All beams are equal then, so only the first may be continued."""
        ruled_out = jnp.full((batch, beams), RULED_OUT, jnp.float32)
        tokens = jnp.zeros((batch, beams, answer_capacity), jnp.int32)
        return cls(
            tokens=tokens,
            logprobs=jnp.zeros(tokens.shape, jnp.float32),
            scores=ruled_out.at[:, 0].set(0.0),
            kept_tokens=tokens,
            kept_logprobs=jnp.zeros(tokens.shape, jnp.float32),
            kept_length=jnp.zeros((batch, beams), jnp.int32),
            kept_scores=ruled_out,
            is_kept=jnp.zeros((batch, beams), bool),
            open=jnp.ones((batch,), bool),
            count=jnp.zeros((), jnp.int32),
        )

    def extended(
        self,
        gains: Float[Array, "B N C"],
        candidates: Int[Array, "B N C"],
        logprobs: Float[Array, "B N C"],
        rule: "Rule",
    ) -> tuple["Hypotheses", Int[Array, "B N"]]:
        """Appends one token to every running beam.

        Args:
            gains: how much each of C continuations adds to the score of its beam.
            candidates: the continuations' tokens.
            logprobs: their log-probabilities, for the output.
            rule: when and how the search ends.

        Returns:
            The new hypotheses; and for each new running beam the index of its continuation, beam · C + candidate.
        """
        batch, beams, width = gains.shape
        flat = (self.scores[:, :, None] + gains).reshape(batch, -1)
        # With this many candidates, N beams continue even if the best continuations of every beam are stop tokens.
        spare = beams * max(2, 1 + rule.stop.shape[0])
        scores, places = jax.lax.top_k(flat, min(spare, beams * width))
        token = jnp.take_along_axis(candidates.reshape(batch, -1), places, axis=1)
        logprob = jnp.take_along_axis(logprobs.reshape(batch, -1), places, axis=1)
        parents = places // width

        def append(history: jax.Array, newest: jax.Array) -> jax.Array:
            followed = jnp.take_along_axis(history, parents[:, :, None], axis=1)
            return jax.lax.dynamic_update_slice_in_dim(followed, newest[:, :, None], self.count, axis=2)

        tokens, history = append(self.tokens, token), append(self.logprobs, logprob)
        count = self.count + 1
        ends = (token[:, :, None] == rule.stop).any(axis=-1) | (count >= rule.limit)

        running, order = jax.lax.top_k(scores + RULED_OUT * ends, beams)
        best = jnp.arange(scores.shape[1]) < beams  # only these may finish; lower ranks replace those that end
        finishes = ends & best & self.open[:, None]
        normalised = jnp.where(finishes, scores / count**rule.length_penalty, RULED_OUT)
        kept_scores, kept_order = jax.lax.top_k(jnp.concatenate([self.kept_scores, normalised], 1), beams)

        def best_of_both(old: jax.Array, new: jax.Array) -> jax.Array:
            return _take_along(jnp.concatenate([old, new], axis=1), kept_order)

        # An answer with NaN log-probabilities stands for logits that were not finite.
        failed = self.open & jnp.isnan(gains + logprobs).any(axis=(1, 2))
        is_kept = best_of_both(self.is_kept, finishes)
        worst = jnp.where(is_kept, kept_scores.min(axis=1, keepdims=True), RULED_OUT)
        improvable = (running[:, :1] / count**rule.length_penalty > worst).any(axis=1)
        hypotheses = Hypotheses(
            tokens=_take_along(tokens, order),
            logprobs=_take_along(history, order),
            scores=running,
            kept_tokens=best_of_both(self.kept_tokens, tokens),
            kept_logprobs=jnp.where(failed[:, None, None], jnp.nan, best_of_both(self.kept_logprobs, history)),
            kept_length=jnp.where(
                failed[:, None], count, best_of_both(self.kept_length, jnp.broadcast_to(count, token.shape))
            ),
            kept_scores=kept_scores,
            is_kept=is_kept,
            open=self.open & improvable & ~ends.all(axis=1) & ~failed,
            count=count,
        )
        return hypotheses, _take_along(places, order)

    def newest(self) -> Int[Array, "B N"]:
        """The last token of every running beam."""
        return jax.lax.dynamic_index_in_dim(self.tokens, self.count - 1, axis=2, keepdims=False)

    def best(self, stop: Int[Array, "E"]) -> Finished:
        """The best finished answer of every sample."""
        tokens, length = self.kept_tokens[:, 0], self.kept_length[:, 0]
        last = jnp.take_along_axis(tokens, jnp.maximum(length - 1, 0)[:, None], axis=1)
        return Finished(tokens, self.kept_logprobs[:, 0], length, (last == stop).any(axis=1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rule:
    """When and how a search ends.

    Attributes:
        stop: tokens that end an answer.
        limit: length of the longest answer.
        length_penalty: scores of finished answers are divided by the length to this power.
    """

    stop: Int[Array, "E"]
    limit: Int[Array, ""]
    length_penalty: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Search:
    """A running beam search: the caches of B·N rows, which contain every token, and the next-token logits."""

    state: State
    logits: Float[Array, "R V"]
    hypotheses: Hypotheses


def take_rows(state: State, rows: Int[Array, "R"]) -> State:
    """A state made of the given rows, in any order and with repetitions."""

    def take(array: jax.Array) -> jax.Array:
        return array[rows] if array.ndim else array

    return dataclasses.replace(
        state,
        caches=jax.tree.map(take, state.caches),
        tracks=tuple(jax.tree.map(take, track) for track in state.tracks),
        memory=jax.tree.map(take, state.memory),
    )


def _reorder(state: State, parents: Int[Array, "B N"]) -> State:
    """The state with the rows that the new beams continue. The prefix depends on the prompt alone and stays."""
    batch, beams = parents.shape
    rows = (jnp.arange(batch)[:, None] * beams + parents).reshape(-1)
    reordered = take_rows(state, rows)
    pairs = zip(reordered.caches, state.caches, strict=True)
    caches = tuple(dataclasses.replace(new, prefix=old.prefix) for new, old in pairs)
    return dataclasses.replace(reordered, caches=caches)


def _begin(state: State, logits: Float[Array, "B V"], beams: int, answer_capacity: int) -> Search:
    """The search right after the prompt, in which every beam is a copy of its sample's row."""
    batch = logits.shape[0]
    rows = jnp.repeat(jnp.arange(batch), beams)
    return Search(take_rows(state, rows), logits[rows], Hypotheses.empty(batch, beams, answer_capacity))


def _step(params: dict, config: FamilyConfig, search: Search, rule: Rule) -> Search:
    """Chooses the next token of every beam and runs it."""
    batch, beams = search.hypotheses.scores.shape
    vocabulary = search.logits.shape[-1]
    logprobs = jax.nn.log_softmax(search.logits).reshape(batch, beams, vocabulary)
    candidates = jnp.broadcast_to(jnp.arange(vocabulary, dtype=jnp.int32), logprobs.shape)
    hypotheses, chosen = search.hypotheses.extended(logprobs, candidates, logprobs, rule)
    state = _reorder(search.state, chosen // vocabulary)
    state, step = forward.decode_step(params, config, state, hypotheses.newest().reshape(-1))
    return Search(state, step.combined, hypotheses)


def _run(params: dict, config: FamilyConfig, search: Search, rule: Rule) -> Search:
    def unfinished(search: Search) -> Bool[Array, ""]:
        return search.hypotheses.open.any()

    return jax.lax.while_loop(unfinished, lambda search: _step(params, config, search, rule), search)


def _take_along(values: Array, places: Int[Array, "B K"]) -> Array:
    """Selects entries along axis 1."""
    return jnp.take_along_axis(values, places if values.ndim == 2 else places[:, :, None], axis=1)


begin = jit(_begin, static_argnames=("beams", "answer_capacity"))
run = jit(_run, static_argnames="config", donate_argnames="search")
