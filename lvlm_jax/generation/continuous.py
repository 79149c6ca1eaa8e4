"""Continuous batching on the device: rows of a batch whose answers have ended take new prompts.

A batch has one write index, but a row's prompt need not lie right before it: unused columns are hidden like padding,
and positions count a sample's tokens. So prompts stay where a prefill puts them, also behind a prefix that branches
share, and answers lie in columns behind them, wherever the index was when they began (T prompt columns, R more):

    column   0 .................. T-1 | T ............... index ........ T+R-1
    row 0    . . B <1 1 1 1> q q q q  | a a a a a a a a a a
    row 1    B t <1 1 1 1> q q q q q  | . . . . . a a a a a                      placed five steps later
    row 2    . . . . B t t q q q q q  | o o o . . . . . . a                      o: of the answer before, hidden

At the end of the columns all answers move left together (`compact`), as far as the longest one under way lets them.
Shapes are static: one program each to place prompts of a size, to run and to compact. A longer prompt than all before
gives every row more columns (`widen`) and so needs those programs again.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lvlm_jax.attention import Block, LayerCache
from lvlm_jax.compilation import jit
from lvlm_jax.generation import drivers, forward
from lvlm_jax.generation.sampling import Sampling
from lvlm_jax.generation.state import State, Track
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors.layout import PROMPT_BUCKET, bucket


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """B rows, each with an answer under way, one that has ended, or none yet.

    Attributes:
        state: caches and tracks; every chosen token but the newest of a row has been run.
        tokens, logprobs: what was generated, M columns reserved.
        count: per row, tokens chosen.
        limit: per row, how many may be chosen.
        running: rows whose answers are under way.
        stopped: rows that chose a stop token, or whose logits were not finite (`Sampling.pick`).
        stop: token ids that end an answer.
        keys: one random key per row.
        seen: tokens of prompt and answer; None unless a repetition penalty needs it.
        sampling: how tokens are chosen.
        prompt: columns for prompts, of each track.
    """

    state: State
    tokens: Int[Array, "B M"]
    logprobs: Float[Array, "B M"]
    count: Int[Array, "B"]
    limit: Int[Array, "B"]
    running: Bool[Array, "B"]
    stopped: Bool[Array, "B"]
    stop: Int[Array, "N"]
    keys: Key[Array, "B"]
    seen: Bool[Array, "B V"] | None
    sampling: Sampling
    prompt: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def answer_capacity(self) -> int:
        """R: columns for answers."""
        return self.state.capacity - self.prompt[0]


@dataclasses.dataclass(frozen=True)
class Size:
    """What prompts take of a row.

    Attributes:
        prompt: columns, of each track.
        window: the last of them in which branches differ; all of them where nothing is shared.
        image_count: images, rounded up as in `Context`.
    """

    prompt: tuple[int, ...]
    window: int
    image_count: int

    @classmethod
    def of(cls, state: State, prompt: tuple[int, ...] | None = None) -> "Size":
        """Of slots, whose `prompt` is given, or of prompts that were just prefilled without columns for an answer."""
        prompt = prompt or tuple(track.image_id.shape[1] for track in state.tracks)
        return cls(prompt, prompt[0] - _shared(state.caches[0]), state.tracks[0].image_count)

    def union(self, other: "Size") -> "Size":
        """What holds the prompts of both."""
        prompt = tuple(max(pair) for pair in zip(self.prompt, other.prompt, strict=True))
        return Size(prompt, max(self.window, other.window), max(self.image_count, other.image_count))


def answer_columns(limit: int) -> tuple[int, int]:
    """M and R for answers of up to `limit` tokens: R so many columns that `compact` always frees some."""
    return bucket(limit), bucket(limit) + PROMPT_BUCKET


def _empty(state: State, sampling: Sampling, stop: Int[Array, "N"], batch: int, limit: int, vocabulary: int) -> Slots:
    """Slots without answers, for prompts like those just prefilled, without columns for an answer.

    Args:
        batch: how many rows.
        limit: longest answer.
        vocabulary: of the logits.
    """
    reserved, capacity = answer_columns(limit)

    def block(like: Block, spare: int) -> Block:
        shape = (batch, like.key.shape[1], like.length + spare, like.key.shape[3])
        return Block(jnp.zeros(shape, like.key.dtype), jnp.zeros(shape, like.value.dtype))

    def cache(like: LayerCache) -> LayerCache:
        prefix = like.prefix and block(like.prefix, 0)
        return LayerCache(prefix, tuple(block(own, capacity) for own in like.own))

    def track(like: Track) -> Track:
        columns = like.image_id.shape[1]
        return Track(
            image_id=jnp.full((batch, columns + capacity), -1, like.image_id.dtype),
            image_end=jnp.zeros((batch,), jnp.int32),
            position=jnp.zeros((batch,), jnp.int32),
            index=jnp.asarray(columns, jnp.int32),
            answer_start=jnp.asarray(columns, jnp.int32),
            image_count=like.image_count,
        )

    numbers, flags = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), bool)
    return Slots(
        state=dataclasses.replace(
            state,
            caches=tuple(map(cache, state.caches)),
            tracks=tuple(map(track, state.tracks)),
            method=jax.tree.map(jnp.copy, state.method),  # slots are donated, and the prefill's state is not
            memory=jax.tree.map(lambda leaf: jnp.zeros((batch, *leaf.shape[1:]), leaf.dtype), state.memory),
        ),
        tokens=jnp.zeros((batch, reserved), jnp.int32),
        logprobs=jnp.zeros((batch, reserved), jnp.float32),
        count=numbers,
        limit=numbers,
        running=flags,
        stopped=flags,
        stop=jnp.asarray(stop),
        keys=jnp.broadcast_to(jax.random.key(0), (batch,)),
        seen=jnp.zeros((batch, vocabulary), bool) if "repetition_penalty" in sampling.rules else None,
        sampling=sampling,
        prompt=tuple(track.image_id.shape[1] for track in state.tracks),
    )


def _place(
    slots: Slots,
    state: State,
    logits: Float[Array, "R V"],
    prompt: Int[Array, "R T"],
    keys: Key[Array, "R"],
    limit: Int[Array, "R"],
    rows: Int[Array, "R"],
) -> Slots:
    """Puts prompts that were prefilled without columns for an answer into rows, and chooses their first tokens.

    Args:
        state, logits: of the prefill; the `Size` of the slots must hold the prompts.
        prompt: their token ids.
        rows: where they go; one prompt given twice may go twice to one row.
    """
    first = drivers.choose_first(state, logits, prompt, slots.sampling, keys, slots.stop, 1)
    return filled(slots, state, first, keys, limit, rows)


def filled(
    slots: Slots,
    state: State,
    first: drivers.Answers,
    keys: Key[Array, "R"],
    limit: Int[Array, "R"],
    rows: Int[Array, "R"],
) -> Slots:
    """The slots with new answers in `rows`.

    Args:
        state: of the prefill, see `_place`.
        first: its first tokens.
    """

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[rows].set(new)

    def put_block(old: Block, new: Block) -> Block:
        def columns(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[rows, :, : new.shape[2]].set(new)

        return Block(columns(old.key, new.key), columns(old.value, new.value))

    def put_cache(old: LayerCache, new: LayerCache) -> LayerCache:
        laid_out = _resized(new, _prompts(slots.prompt, new), _shared(old))
        prefix = old.prefix and put_block(old.prefix, laid_out.prefix)
        return LayerCache(prefix, tuple(put_block(*both) for both in zip(old.own, laid_out.own, strict=True)))

    def put_track(old: Track, new: Track, columns: int) -> Track:
        before = columns - new.image_id.shape[1]
        image_id = jnp.pad(new.image_id, ((0, 0), (before, slots.answer_capacity)), constant_values=-1)
        return dataclasses.replace(
            old,
            image_id=put(old.image_id, image_id),
            image_end=put(old.image_end, _moved(new.image_end, before)),
            position=put(old.position, new.position),
        )

    placed = dataclasses.replace(
        slots.state,
        caches=tuple(put_cache(*both) for both in zip(slots.state.caches, state.caches, strict=True)),
        tracks=tuple(put_track(*both) for both in zip(slots.state.tracks, state.tracks, slots.prompt, strict=True)),
        memory=jax.tree.map(put, slots.state.memory, state.memory),
    )
    return dataclasses.replace(
        slots,
        state=placed,
        tokens=slots.tokens.at[rows, 0].set(first.tokens[:, 0]),
        logprobs=slots.logprobs.at[rows, 0].set(first.logprobs[:, 0]),
        count=put(slots.count, jnp.ones_like(limit)),
        limit=put(slots.limit, limit),
        running=put(slots.running, ~first.finished & (limit > 1)),
        stopped=put(slots.stopped, first.finished),
        keys=put(slots.keys, keys),
        seen=None if slots.seen is None else put(slots.seen, first.seen),
    )


def advance(params: dict, config: FamilyConfig, slots: Slots) -> Slots:
    """Runs the newest token of every row, and chooses the next token of those whose answers are under way."""
    newest = slots.tokens[jnp.arange(slots.count.shape[0]), jnp.maximum(slots.count - 1, 0)]
    state, step = forward.decode_step(params, config, slots.state, newest)
    return chosen(slots, state, step.combined)


def chosen(slots: Slots, state: State, logits: Float[Array, "B V"]) -> Slots:
    """The slots behind a decode step, with the next token of rows whose answers are under way."""
    every, running = jnp.arange(slots.count.shape[0]), slots.running
    tokens, logprobs = slots.sampling.pick(logits, slots.keys, slots.count, slots.seen)
    # The other rows write behind the last column, which is nowhere.
    column = jnp.where(running, slots.count, slots.tokens.shape[1])
    count = slots.count + running
    stopped = running & ((tokens[:, None] == slots.stop).any(axis=1) | jnp.isnan(logprobs))
    return dataclasses.replace(
        slots,
        state=state,
        tokens=slots.tokens.at[every, column].set(tokens, mode="drop"),
        logprobs=slots.logprobs.at[every, column].set(logprobs, mode="drop"),
        count=count,
        running=running & ~stopped & (count < slots.limit),
        stopped=slots.stopped | stopped,
        seen=None if slots.seen is None else slots.seen.at[every, tokens].set(True),
    )


def _run(params: dict, config: FamilyConfig, slots: Slots, free: Int[Array, ""]) -> Slots:
    """Decodes until at least `free` rows have no answer under way, or all columns are used."""

    def unfinished(slots: Slots) -> Bool[Array, ""]:
        return ((~slots.running).sum() < free) & (slots.state.index < slots.state.capacity)

    return jax.lax.while_loop(unfinished, lambda slots: advance(params, config, slots), slots)


def _compact(slots: Slots) -> Slots:
    """Moves all answers left, so that the longest one under way begins right behind the prompts."""
    capacity = slots.answer_capacity
    written = slots.state.index - slots.prompt[0]
    shift = written - jnp.where(slots.running, slots.count - 1, 0).max()

    def moved(array: jax.Array, axis: int) -> jax.Array:
        start = array.shape[axis] - capacity
        answers = jax.lax.slice_in_dim(array, start, None, axis=axis)
        return jax.lax.dynamic_update_slice_in_dim(array, jnp.roll(answers, -shift, axis), start, axis)

    def cache(old: LayerCache) -> LayerCache:
        return LayerCache(old.prefix, tuple(Block(moved(own.key, 2), moved(own.value, 2)) for own in old.own))

    def track(old: Track) -> Track:
        # The columns that are free again come from the left end, with what was there before.
        freed = jnp.arange(old.image_id.shape[1]) >= old.index - shift
        image_id = jnp.where(freed, -1, moved(old.image_id, 1))
        return dataclasses.replace(old, image_id=image_id, index=old.index - shift)

    state = dataclasses.replace(
        slots.state, caches=tuple(map(cache, slots.state.caches)), tracks=tuple(map(track, slots.state.tracks))
    )
    return dataclasses.replace(slots, state=state)


def _widen(slots: Slots, size: Size) -> Slots:
    """The same rows with columns for larger prompts; `size` is at least the present one."""
    shared = size.prompt[0] - size.window

    def track(old: Track, before: int, after: int) -> Track:
        more = after - before
        return dataclasses.replace(
            old,
            image_id=jnp.pad(old.image_id, ((0, 0), (more, 0)), constant_values=-1),
            image_end=_moved(old.image_end, more),
            index=old.index + more,
            answer_start=old.answer_start + more,
            image_count=size.image_count,
        )

    def cache(old: LayerCache) -> LayerCache:
        columns = tuple(prompt + slots.answer_capacity for prompt in _prompts(size.prompt, old))
        return _resized(old, columns, shared)

    state = dataclasses.replace(
        slots.state,
        caches=tuple(map(cache, slots.state.caches)),
        tracks=tuple(track(*each) for each in zip(slots.state.tracks, slots.prompt, size.prompt, strict=True)),
    )
    return dataclasses.replace(slots, state=state, prompt=size.prompt)


def _moved(image_end: Int[Array, "B"], columns: int) -> Int[Array, "B"]:
    """`image_end` behind so many columns more; 0 still says that there is no image."""
    return jnp.where(image_end > 0, image_end + columns, 0)


def _shared(cache: LayerCache) -> int:
    """How many columns the branches share."""
    return cache.prefix.length if cache.prefix else 0


def _prompts(prompt: tuple[int, ...], cache: LayerCache) -> tuple[int, ...]:
    """The prompt columns of each branch: branches have one track together, or one each."""
    return prompt if len(prompt) == len(cache.own) else prompt * len(cache.own)


def _resized(cache: LayerCache, columns: tuple[int, ...], shared: int) -> LayerCache:
    """The same columns at the right end of `columns` ones per branch, the first `shared` of them as a prefix.

    A prefix must be the same for all branches: columns of the one before, or padding.
    """

    def whole(own: Block, total: int) -> Block:
        def joined(prefix: jax.Array | None, own: jax.Array) -> jax.Array:
            parts = own if prefix is None else jnp.concatenate([prefix, own], axis=2)
            return jnp.pad(parts, ((0, 0), (0, 0), (total - parts.shape[2], 0), (0, 0)))

        prefix = cache.prefix
        return Block(joined(prefix and prefix.key, own.key), joined(prefix and prefix.value, own.value))

    branches = [whole(*each) for each in zip(cache.own, columns, strict=True)]
    own = tuple(Block(branch.key[:, :, shared:], branch.value[:, :, shared:]) for branch in branches)
    return LayerCache(branches[0].first(shared) if shared else None, own)


empty = jit(_empty, static_argnames=("batch", "limit", "vocabulary"))
place = jit(_place, donate_argnames="slots")
run = jit(_run, static_argnames="config", donate_argnames="slots")
compact = jit(_compact, donate_argnames="slots")
widen = jit(_widen, static_argnames="size")
