"""Continuous batching on the device: when an answer ends, its row gets a new prompt.

All rows share one write index, but a row's prompt need not end right before it: unused columns are hidden like padding,
and positions count a sample's tokens. So prompts stay where a prefill writes them (after the prefix that branches
share, if there is one), and each answer begins at the current write index (T prompt columns, R answer columns):

    column   0 .................. T-1 | T ............... index ........ T+R-1
    row 0    . . B <1 1 1 1> q q q q  | a a a a a a a a a a
    row 1    B t <1 1 1 1> q q q q q  | . . . . . a a a a a                      placed five steps later
    row 2    . . . . B t t q q q q q  | o o o . . . . . . a                      o: the answer before, hidden

When the columns are used up, `compact` moves all answers left as far as the longest running one allows. Shapes are
static: placing prompts of one size, running and compacting are one program each. A prompt that is longer than all
before widens every row (`widen`), and these programs are compiled again.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from lvlm_jax import parallel
from lvlm_jax.attention import Block, LayerCache
from lvlm_jax.compilation import jit
from lvlm_jax.generation import decode_loop, forward
from lvlm_jax.generation.sampling import Sampling
from lvlm_jax.generation.state import State, Track
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors.layout import PROMPT_BUCKET, bucket


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """B rows; each has a running answer, a finished answer, or no answer yet.

    Attributes:
        state: caches and tracks; every token of a row except its newest has been run.
        tokens, logprobs: generated tokens, in buffers of M columns.
        count: number of tokens generated, per row.
        limit: largest number of tokens, per row.
        running: rows with an unfinished answer.
        stopped: rows that generated a stop token, or whose logits were not finite (`Sampling.pick`).
        stop: token ids that end an answer.
        keys: one random key per row.
        seen_tokens: tokens of prompt and answer; None unless a repetition penalty needs it.
        sampling: how tokens are chosen.
        prompt: number of prompt columns in each track.
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
    seen_tokens: Bool[Array, "B V"] | None
    sampling: Sampling
    prompt: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def answer_capacity(self) -> int:
        """R: number of answer columns."""
        return self.state.capacity - self.prompt[0]


@dataclasses.dataclass(frozen=True)
class PromptSize:
    """The size of prompts in a row.

    Attributes:
        prompt: number of prompt columns in each track.
        tail_rows: how many of the last columns differ between branches; all of them if nothing is shared.
        image_count: number of images, rounded up as in `Context`.
    """

    prompt: tuple[int, ...]
    tail_rows: int
    image_count: int

    @classmethod
    def of(cls, state: State, prompt: tuple[int, ...] | None = None) -> "PromptSize":
        """The size of prompts: those of slots, whose `prompt` is passed, or of a prefill without answer columns."""
        prompt = prompt or tuple(track.image_id.shape[1] for track in state.tracks)
        return cls(prompt, prompt[0] - _shared_columns(state.caches[0]), state.tracks[0].image_count)

    def union(self, other: "PromptSize") -> "PromptSize":
        """The smallest size that has room for both."""
        prompt = tuple(max(pair) for pair in zip(self.prompt, other.prompt, strict=True))
        return PromptSize(prompt, max(self.tail_rows, other.tail_rows), max(self.image_count, other.image_count))


def answer_columns(limit: int) -> tuple[int, int]:
    """M and R for answers of up to `limit` tokens; R is large enough that `compact` always frees some columns."""
    return bucket(limit), bucket(limit) + PROMPT_BUCKET


def _empty(state: State, sampling: Sampling, stop: Int[Array, "N"], batch: int, limit: int, vocabulary: int) -> Slots:
    """Slots without answers, for prompts like those of `state`, which was prefilled without answer columns.

    Args:
        batch: number of rows.
        limit: length of the longest answer.
        vocabulary: size of the logits.
    """
    buffer, capacity = answer_columns(limit)

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
            method=jax.tree.map(jnp.copy, state.method),  # slots are donated, the prefill's state is not
            memory=jax.tree.map(lambda leaf: jnp.zeros((batch, *leaf.shape[1:]), leaf.dtype), state.memory),
        ),
        tokens=jnp.zeros((batch, buffer), jnp.int32),
        logprobs=jnp.zeros((batch, buffer), jnp.float32),
        count=numbers,
        limit=numbers,
        running=flags,
        stopped=flags,
        stop=jnp.asarray(stop),
        keys=jnp.broadcast_to(jax.random.key(0), (batch,)),
        seen_tokens=jnp.zeros((batch, vocabulary), bool) if "repetition_penalty" in sampling.rules else None,
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
    """Writes prefilled prompts into rows and chooses their first tokens.

    Args:
        state, logits: results of a prefill without answer columns; the slots must have room for the prompts.
        prompt: token ids of the prompts.
        rows: the row for each prompt; a prompt that occurs twice may go to the same row twice.
    """
    first = decode_loop.choose_first(state, logits, prompt, slots.sampling, keys, slots.stop, 1)
    return fill(slots, state, first, keys, limit, rows)


def fill(
    slots: Slots,
    state: State,
    first: decode_loop.Answers,
    keys: Key[Array, "R"],
    limit: Int[Array, "R"],
    rows: Int[Array, "R"],
) -> Slots:
    """The slots with new answers in `rows`.

    Args:
        state: result of the prefill, see `_place`.
        first: the answers with their first tokens.
    """

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[rows].set(new)

    def put_block(old: Block, new: Block) -> Block:
        def columns(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[rows, :, : new.shape[2]].set(new)

        return Block(columns(old.key, new.key), columns(old.value, new.value))

    def put_cache(old: LayerCache, new: LayerCache) -> LayerCache:
        laid_out = _resize(new, _prompts(slots.prompt, new), _shared_columns(old))
        prefix = old.prefix and put_block(old.prefix, laid_out.prefix)
        return LayerCache(prefix, tuple(put_block(*pair) for pair in zip(old.own, laid_out.own, strict=True)))

    def put_track(old: Track, new: Track, columns: int) -> Track:
        before = columns - new.image_id.shape[1]
        image_id = jnp.pad(new.image_id, ((0, 0), (before, slots.answer_capacity)), constant_values=-1)
        return dataclasses.replace(
            old,
            image_id=put(old.image_id, image_id),
            image_end=put(old.image_end, _shift_image_end(new.image_end, before)),
            position=put(old.position, new.position),
        )

    new_state = dataclasses.replace(
        slots.state,
        caches=tuple(put_cache(*group) for group in zip(slots.state.caches, state.caches, strict=True)),
        tracks=tuple(put_track(*group) for group in zip(slots.state.tracks, state.tracks, slots.prompt, strict=True)),
        memory=jax.tree.map(put, slots.state.memory, state.memory),
    )
    return dataclasses.replace(
        slots,
        state=new_state,
        tokens=slots.tokens.at[rows, 0].set(first.tokens[:, 0]),
        logprobs=slots.logprobs.at[rows, 0].set(first.logprobs[:, 0]),
        count=put(slots.count, jnp.ones_like(limit)),
        limit=put(slots.limit, limit),
        running=put(slots.running, ~first.finished & (limit > 1)),
        stopped=put(slots.stopped, first.finished),
        keys=put(slots.keys, keys),
        seen_tokens=None if slots.seen_tokens is None else put(slots.seen_tokens, first.seen_tokens),
    )


def advance(params: dict, config: FamilyConfig, slots: Slots) -> Slots:
    """Runs the newest token of every row and chooses the next token of running answers."""
    newest = slots.tokens[jnp.arange(slots.count.shape[0]), jnp.maximum(slots.count - 1, 0)]
    state, step = forward.decode_step(params, config, slots.state, newest)
    return choose_next(slots, state, step.combined)


def choose_next(slots: Slots, state: State, logits: Float[Array, "B V"]) -> Slots:
    """The slots after a decode step, with the next token of running answers."""
    every, running = jnp.arange(slots.count.shape[0]), slots.running
    tokens, logprobs = slots.sampling.pick(logits, slots.keys, slots.count, slots.seen_tokens)
    # The other rows write to a column out of range, which JAX drops.
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
        seen_tokens=None if slots.seen_tokens is None else slots.seen_tokens.at[every, tokens].set(True),
    )


def _run(params: dict, config: FamilyConfig, slots: Slots, free: Int[Array, ""], steps: Int[Array, ""]) -> Slots:
    """Decodes `steps` tokens, or until at least `free` rows have no running answer, or all columns are used."""
    end = slots.state.index + steps

    def unfinished(slots: Slots) -> Bool[Array, ""]:
        index = slots.state.index
        return ((~slots.running).sum() < free) & (index < slots.state.capacity) & (index < end)

    return jax.lax.while_loop(unfinished, lambda slots: advance(params, config, slots), slots)


def _compact(slots: Slots) -> Slots:
    """Moves all answers left, so that the longest running one begins right after the prompts."""
    capacity = slots.answer_capacity
    answer_columns_used = slots.state.index - slots.prompt[0]
    shift = answer_columns_used - jnp.where(slots.running, slots.count - 1, 0).max()

    def shift_left(array: jax.Array, axis: int) -> jax.Array:
        start = array.shape[axis] - capacity
        answers = jax.lax.slice_in_dim(array, start, None, axis=axis)
        return jax.lax.dynamic_update_slice_in_dim(array, jnp.roll(answers, -shift, axis), start, axis)

    def cache(old: LayerCache) -> LayerCache:
        return LayerCache(old.prefix, tuple(Block(shift_left(own.key, 2), shift_left(own.value, 2)) for own in old.own))

    def track(old: Track) -> Track:
        # `roll` moves the first columns to the end, with their old content.
        is_freed = jnp.arange(old.image_id.shape[1]) >= old.index - shift
        image_id = jnp.where(is_freed, -1, shift_left(old.image_id, 1))
        return dataclasses.replace(old, image_id=image_id, index=old.index - shift)

    state = dataclasses.replace(
        slots.state, caches=tuple(map(cache, slots.state.caches)), tracks=tuple(map(track, slots.state.tracks))
    )
    return dataclasses.replace(slots, state=state)


def _widen(slots: Slots, size: PromptSize) -> Slots:
    """The same rows with columns for larger prompts; `size` is at least the present size."""
    shared = size.prompt[0] - size.tail_rows

    def track(old: Track, before: int, after: int) -> Track:
        extra = after - before
        return dataclasses.replace(
            old,
            image_id=jnp.pad(old.image_id, ((0, 0), (extra, 0)), constant_values=-1),
            image_end=_shift_image_end(old.image_end, extra),
            index=old.index + extra,
            answer_start=old.answer_start + extra,
            image_count=size.image_count,
        )

    def cache(old: LayerCache) -> LayerCache:
        columns = tuple(prompt + slots.answer_capacity for prompt in _prompts(size.prompt, old))
        return _resize(old, columns, shared)

    state = dataclasses.replace(
        slots.state,
        caches=tuple(map(cache, slots.state.caches)),
        tracks=tuple(track(*each) for each in zip(slots.state.tracks, slots.prompt, size.prompt, strict=True)),
    )
    return dataclasses.replace(slots, state=state, prompt=size.prompt)


def shardings(slots: Slots, mesh: Mesh) -> Slots:
    """A sharding for every array: rows over the data axes and key heads over `tensor`, where these divide them."""
    rows, everywhere = parallel.row_sharding(mesh, slots.count.shape[0]), NamedSharding(mesh, PartitionSpec())

    def by_row(tree):
        return jax.tree.map(lambda leaf: rows if leaf.ndim else everywhere, tree)

    def block(own: Block) -> Block:
        return jax.tree.map(lambda leaf: parallel.cache_sharding(mesh, leaf.shape), own)

    def cache(one: LayerCache) -> LayerCache:
        return LayerCache(one.prefix and block(one.prefix), tuple(map(block, one.own)))

    state = dataclasses.replace(
        by_row(slots.state),
        caches=tuple(map(cache, slots.state.caches)),
        method=jax.tree.map(lambda leaf: everywhere, slots.state.method),
    )
    return dataclasses.replace(by_row(slots), state=state, stop=everywhere)


def _shift_image_end(image_end: Int[Array, "B"], columns: int) -> Int[Array, "B"]:
    """`image_end` after `columns` columns were inserted; 0 still means no image."""
    return jnp.where(image_end > 0, image_end + columns, 0)


def _shared_columns(cache: LayerCache) -> int:
    """How many columns the branches share."""
    return cache.prefix.length if cache.prefix else 0


def _prompts(prompt: tuple[int, ...], cache: LayerCache) -> tuple[int, ...]:
    """Number of prompt columns of each branch; the branches share one track, or each has its own."""
    return prompt if len(prompt) == len(cache.own) else prompt * len(cache.own)


def _resize(cache: LayerCache, columns: tuple[int, ...], shared: int) -> LayerCache:
    """The same columns, right-aligned in `columns` columns per branch; the first `shared` of them are the prefix.

    The prefix must be equal for all branches: columns of the old prefix, or padding.
    """

    def all_columns(own: Block, total: int) -> Block:
        def join(prefix: jax.Array | None, own: jax.Array) -> jax.Array:
            parts = own if prefix is None else jnp.concatenate([prefix, own], axis=2)
            return jnp.pad(parts, ((0, 0), (0, 0), (total - parts.shape[2], 0), (0, 0)))

        prefix = cache.prefix
        return Block(join(prefix and prefix.key, own.key), join(prefix and prefix.value, own.value))

    branches = [all_columns(*each) for each in zip(cache.own, columns, strict=True)]
    own = tuple(Block(branch.key[:, :, shared:], branch.value[:, :, shared:]) for branch in branches)
    return LayerCache(branches[0].first(shared) if shared else None, own)


empty = jit(_empty, static_argnames=("batch", "limit", "vocabulary"))
place = jit(_place, donate_argnames="slots")
run = jit(_run, static_argnames="config", donate_argnames="slots")
compact = jit(_compact, donate_argnames="slots")
widen = jit(_widen, static_argnames="size")
