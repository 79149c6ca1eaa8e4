"""The search of OPERA (`methods.OPERA` has the formulas): a beam search that runs candidates and can roll back.

It runs one sample at a time, because samples roll back at different times and to different places; the beams are the
rows of a batch. Each token is one program: run every candidate of every beam, score, choose, keep the chosen rows. The
host keeps a small record of every step, without caches. A rollback marks the columns of the answer as unwritten and
reruns the beams of the earlier step token by token.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.attention import Tap
from lvlm_jax.compilation import jit
from lvlm_jax.generation import forward
from lvlm_jax.generation.beam import RULED_OUT, Finished, Hypotheses, Rule, take_rows
from lvlm_jax.generation.state import State
from lvlm_jax.methods import OPERA
from lvlm_jax.models.family import FamilyConfig


def tap(config: FamilyConfig) -> Tap:
    """The tap that the prefill needs: the attention of the last layer."""
    return Tap(layers=(config.text.num_layers - 1,))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SearchStep:
    """The result of a step; N beams, M answer columns.

    Attributes:
        hypotheses: answers, as a batch of one.
        products: logarithms of the column products of every beam.
        columns: the result of `OPERA.noted` for every token.
        parents: for each beam, its index before the newest token.
    """

    hypotheses: Hypotheses
    products: Float[Array, "N M"]
    columns: Int[Array, "N M"]
    parents: Int[Array, "N"]

    @classmethod
    def empty(cls, beams: int, answer_capacity: int) -> "SearchStep":
        return cls(
            Hypotheses.empty(1, beams, answer_capacity),
            jnp.full((beams, answer_capacity), -jnp.inf, jnp.float32),
            jnp.zeros((beams, answer_capacity), jnp.int32),
            jnp.zeros((beams,), jnp.int32),
        )


def _step(
    params: dict,
    config: FamilyConfig,
    state: State,
    logits: Float[Array, "N V"],
    record: SearchStep,
    banned: Int[Array, "N X"],
    method: OPERA,
    rule: Rule,
) -> tuple[State, Float[Array, "N V"], SearchStep]:
    """Runs all candidates and keeps the best.

    Args:
        state: caches of the N beams.
        logits: next-token logits of every beam.
        banned: tokens that a beam may not choose; -1 means none.
    """
    beams, answer_capacity = record.products.shape
    newest = record.hypotheses.count
    width = min(method.candidates, logits.shape[1])
    candidate_logits, candidates = jax.lax.top_k(logits, width)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), candidates, axis=1)

    rows_to_try = take_rows(state, jnp.repeat(jnp.arange(beams), width))
    tried, step = forward.decode_step(params, config, rows_to_try, candidates.reshape(-1))
    row = method.weights_of_rows(step.tapped.attention[0, 0, :, :, 0])
    image_weight = jnp.where(tried.image_id > 0, row, 0).sum(axis=-1)
    before = jnp.repeat(record.products, width, axis=0)
    products = method.products(before, row[:, -answer_capacity:], newest)
    over_trust, column = method.over_trust(products, newest, image_weight)

    gains = method.gains(candidate_logits, logprobs, over_trust.reshape(beams, width))
    gains = jnp.where((candidates[:, :, None] == banned[:, None]).any(axis=-1), RULED_OUT, gains)
    hypotheses, chosen = record.hypotheses.extended(gains[None], candidates[None], logprobs[None], rule)
    rows = chosen[0]
    parents = rows // width
    columns = method.noted(record.columns, column.reshape(beams, width), parents, rows, newest)
    after = SearchStep(hypotheses, products[rows], columns, parents)
    return take_rows(tried, rows), step.combined[rows], after


def _replay(
    params: dict, config: FamilyConfig, state: State, hypotheses: Hypotheses
) -> tuple[State, Float[Array, "N V"]]:
    """Marks the answer's columns as unwritten and runs the beams' tokens again."""
    track = state.tracks[0]
    start = state.capacity - hypotheses.tokens.shape[2]
    in_prompt = jnp.arange(state.capacity) < start
    track = dataclasses.replace(
        track,
        image_id=jnp.where(in_prompt, track.image_id, -1),
        position=track.position - (track.index - start),
        index=jnp.full_like(track.index, start),
    )

    def run(place: Int[Array, ""], carried: tuple) -> tuple:
        tokens = jax.lax.dynamic_index_in_dim(hypotheses.tokens[0], place, axis=1, keepdims=False)
        state, step = forward.decode_step(params, config, carried[0], tokens)
        return state, step.combined

    beams, vocabulary = hypotheses.tokens.shape[1], config.text.vocab_size
    blank = jnp.zeros((beams, vocabulary), jnp.float32)
    cleared = dataclasses.replace(state, tracks=(track,))
    return jax.lax.fori_loop(0, hypotheses.count, run, (cleared, blank))


take = jit(lambda state, logits, rows: (take_rows(state, rows), logits[rows]))
step = jit(_step, static_argnames="config", donate_argnames="state")
replay = jit(_replay, static_argnames="config", donate_argnames="state")


class Rollbacks:
    """Decides, on the host, when a sample rolls back, to which token, and which tokens are banned there."""

    def __init__(self, method: OPERA):
        self.method = method
        self.counts: dict[int, int] = {}  # number of rollbacks to each position
        self.banned: dict[int, list[tuple[int, int]]] = {}  # (beam, token) pairs by position
        self.latest = 0

    def target(self, columns: Int[np.ndarray, "N T"], alive: list[Bool[np.ndarray, "N"]]) -> int | None:
        """The index of the last token to keep, or None for no rollback.

        Args:
            columns: the result of `OPERA.noted` for every token.
            alive: for each number of tokens so far, the beams that were not ruled out.
        """
        place = self.method.recurring(columns, alive[-1])
        if place is None or place >= columns.shape[1] - 1:
            return None
        if self.method.variant == "paper" and place < self.latest:
            return None
        for target in (place, place - 1):
            if target >= 0 and self._may(target, alive[target + 1]):
                self.latest = place
                return target
        return None

    def _may(self, target: int, alive: Bool[np.ndarray, "N"]) -> bool:
        if self.counts.get(target, 0) >= self.method.max_rollbacks:
            return False
        # A candidate must remain even after this rollback.
        num_banned = sum(bool(alive[beam]) for beam, _ in self.banned.get(target, ()))
        return num_banned + self.method.beams < alive.sum() * self.method.candidates

    def note(self, target: int, pairs: list[tuple[int, int]]) -> None:
        """Records a rollback: `pairs` were chosen after token `target`. Bans at later positions are lifted."""
        self.counts[target] = self.counts.get(target, 0) + 1
        self.banned = {place: old for place, old in self.banned.items() if place <= target}
        self.banned[target] = self.banned.get(target, []) + pairs

    def tokens(self, target: int) -> Int[np.ndarray, "N X"]:
        """The tokens that each beam may not choose right after token `target`, padded with -1."""
        width = max(1, self.method.beams * self.method.max_rollbacks)
        table = np.full((self.method.beams, width), -1, np.int32)
        for place, (beam, token) in enumerate(self.banned.get(target, ())):
            table[beam, place] = token
        return table


def search(
    params: dict,
    config: FamilyConfig,
    state: State,
    logits: Float[Array, "N V"],
    method: OPERA,
    rule: Rule,
    answer_capacity: int,
) -> tuple[Finished, list[tuple[int, int]]]:
    """Answers one sample.

    Args:
        state: the state after the prompt, with one row per beam and the `tap` of this module; donated. Its last
            `answer_capacity` columns are for the answer.
        logits: next-token logits.

    Returns:
        The answer, and for each rollback the number of tokens before and after it.
    """
    rollbacks, history = Rollbacks(method), []
    records, alive = [SearchStep.empty(method.beams, answer_capacity)], [np.arange(method.beams) == 0]
    while True:
        count = len(records) - 1
        banned = rollbacks.tokens(count - 1)
        state, logits, record = step(params, config, state, logits, records[-1], banned, method, rule)
        hypotheses = record.hypotheses
        columns, scores, is_open = jax.device_get((record.columns, hypotheses.scores[0], hypotheses.open[0]))
        if not is_open:
            return hypotheses.best(rule.stop), history
        records.append(record)
        alive.append(scores > RULED_OUT / 2)
        target = rollbacks.target(columns[:, : count + 1], alive)
        if target is None:
            continue
        after = records[target + 2]
        pairs = zip(after.parents.tolist(), after.hypotheses.newest()[0].tolist(), strict=True)
        rollbacks.note(target, list(pairs))
        history.append((count + 1, target + 1))
        records, alive = records[: target + 2], alive[: target + 2]
        state, logits = replay(params, config, state, records[-1].hypotheses)


def run(
    params: dict,
    config: FamilyConfig,
    state: State,
    logits: Float[Array, "B V"],
    method: OPERA,
    rule: Rule,
    answer_capacity: int,
) -> Finished:
    """Answers a batch, sample by sample; arguments as in `search`, with one row per sample."""
    answers = []
    for sample in range(logits.shape[0]):
        rows = np.full((method.beams,), sample, np.int32)
        answer, _ = search(params, config, *take(state, logits, rows), method, rule, answer_capacity)
        answers.append(answer)
    return Finished(*(jnp.concatenate(parts) for parts in zip(*answers, strict=True)))
