"""Two loops over one decode step: a `while_loop` on the device for throughput, a Python loop for streaming.

Both produce the same tokens. The step limit of the device loop is data, not structure, so the host can pause it to
check for stop strings without another program.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lvlm_jax.attention import Tap, Tapped
from lvlm_jax.compilation import jit
from lvlm_jax.errors import LVLMError, shown
from lvlm_jax.generation import forward
from lvlm_jax.generation.sampling import Sampling
from lvlm_jax.generation.state import Prompt, State, Step
from lvlm_jax.methods import Method
from lvlm_jax.models.family import FamilyConfig

encode_images = jit(forward.encode_images, static_argnames="config")
encode_edited = jit(forward.encode_edited, static_argnames="config")
embed = jit(forward.embed, static_argnames="config")
full_forward = jit(forward.full_forward, static_argnames=("config", "tail_rows", "image_count", "tap"))


def _tapped(
    params: dict,
    config: FamilyConfig,
    prompt: Prompt,
    method: Method | None,
    tail_rows: int,
    image_count: int = 1,
    tap: Tap = forward.NOTHING,
) -> Tapped:
    """The tapped arrays of a full forward pass; its logits are not computed."""
    return forward.full_forward(params, config, prompt, method, tail_rows, image_count, tap)[1]


tapped_forward = jit(_tapped, static_argnames=("config", "tail_rows", "image_count", "tap"))
PREFILL_OPTIONS = ("tail_rows", "capacity", "contrast_capacity", "image_count", "share_prefix", "tap")
prefill = jit(forward.prefill, static_argnames=("config", *PREFILL_OPTIONS))
prefix = jit(forward.prefix, static_argnames=("config", "end", "split", "image_count"))
extended = jit(forward.extended, static_argnames=("config", "rows", "split", "image_count"), donate_argnames="caches")
contrast_pixels = jit(lambda method, pixels, index: method.contrast_pixels(pixels, index))
contrast_image = jit(lambda method, picture, index: method.contrast_image(picture, index))
salience = jit(forward.salience, static_argnames="config")
with_fewer_tokens = jit(forward.with_fewer_tokens, static_argnames="image_count")
contrast_tokens = jit(
    lambda method, prompt: dataclasses.replace(
        prompt, embeddings=method.contrast_tokens(prompt.embeddings, prompt.image_id)
    )
)
probe = jit(forward.probe, static_argnames=("config", "image_count"))
decode_step = jit(forward.decode_step, static_argnames="config", donate_argnames="state")


def decode(params: dict, config: FamilyConfig, state: State, tokens: Any) -> tuple[State, Step]:
    """Appends one token per sample and returns the next logits; `state` is donated.

    Raises:
        LVLMError: the state is full, or there is not one token per sample.
    """
    expected = state.position.shape
    if not hasattr(tokens, "shape") and not (isinstance(tokens, Sequence) and len(tokens) == expected[0]):
        raise LVLMError(f"tokens are {shown(tokens)}; expected {expected}, one per sample")
    try:
        tokens = jnp.asarray(tokens, jnp.int32)
    except (TypeError, ValueError, OverflowError) as error:
        raise LVLMError(f"tokens are {shown(tokens)}; expected a token id per sample") from error
    if tokens.shape != expected:
        raise LVLMError(f"tokens have shape {tokens.shape}; expected {expected}, one per sample")
    if int(state.index) >= state.capacity:
        raise LVLMError(f"the state holds {state.capacity} columns and is full; give prefill a larger max_length")
    return decode_step(params, config, state, tokens)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Answers:
    """Running answers.

    Attributes:
        state: caches; every token except the last has been run.
        tokens, logprobs: generated tokens, in buffers of M columns.
        count: number of columns written.
        length: per sample, number of tokens including the stop token; equal to `count` while the answer is unfinished.
        finished: samples that generated a stop token, or whose logits were not finite (`Sampling.pick`).
        stop: token ids that end an answer.
        keys: one random key per sample.
        seen_tokens: tokens of prompt and answer; None unless a repetition penalty needs it.
        sampling: how tokens are chosen.
    """

    state: State
    tokens: Int[Array, "B M"]
    logprobs: Float[Array, "B M"]
    count: Int[Array, ""]
    length: Int[Array, "B"]
    finished: Bool[Array, "B"]
    stop: Int[Array, "N"]
    keys: Key[Array, "B"]
    seen_tokens: Bool[Array, "B V"] | None
    sampling: Sampling


def choose_first(
    state: State,
    logits: Float[Array, "B V"],
    prompt: Int[Array, "B T"],
    sampling: Sampling,
    keys: Key[Array, "B"],
    stop: Int[Array, "N"],
    answer_capacity: int,
) -> Answers:
    """Chooses the first token after a prefill whose caches have room for `answer_capacity` more tokens."""
    batch, vocabulary = logits.shape
    seen_tokens = None
    if "repetition_penalty" in sampling.rules:
        counts = (state.image_id[:, : prompt.shape[1]] >= 0) & (prompt < vocabulary)
        seen_tokens = jnp.zeros((batch, vocabulary), bool)
        seen_tokens = seen_tokens.at[jnp.arange(batch)[:, None], jnp.where(counts, prompt, 0)].max(counts)
    answers = Answers(
        state=state,
        tokens=jnp.zeros((batch, answer_capacity), jnp.int32),
        logprobs=jnp.zeros((batch, answer_capacity), jnp.float32),
        count=jnp.zeros((), jnp.int32),
        length=jnp.zeros((batch,), jnp.int32),
        finished=jnp.zeros((batch,), bool),
        stop=stop,
        keys=keys,
        seen_tokens=seen_tokens,
        sampling=sampling,
    )
    return _choose(answers, state, logits)


def advance(params: dict, config: FamilyConfig, answers: Answers) -> Answers:
    """Runs the newest token of every sample and chooses the next."""
    newest = jax.lax.dynamic_index_in_dim(answers.tokens, answers.count - 1, axis=1, keepdims=False)
    state, step = forward.decode_step(params, config, answers.state, newest)
    return _choose(answers, state, step.combined)


def _choose(answers: Answers, state: State, logits: Float[Array, "B V"]) -> Answers:
    tokens, logprobs = answers.sampling.pick(logits, answers.keys, answers.count, answers.seen_tokens)
    seen_tokens = answers.seen_tokens
    if seen_tokens is not None:
        seen_tokens = seen_tokens.at[jnp.arange(tokens.shape[0]), tokens].set(True)

    def write(buffer: jax.Array, column: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(buffer, column, answers.count, axis=1)

    return dataclasses.replace(
        answers,
        state=state,
        tokens=write(answers.tokens, tokens),
        logprobs=write(answers.logprobs, logprobs),
        count=answers.count + 1,
        length=answers.length + ~answers.finished,
        finished=answers.finished | (tokens[:, None] == answers.stop).any(axis=1) | jnp.isnan(logprobs),
        seen_tokens=seen_tokens,
    )


def _run(params: dict, config: FamilyConfig, answers: Answers, limit: Int[Array, ""]) -> Answers:
    def unfinished(answers: Answers) -> Bool[Array, ""]:
        return (answers.count < limit) & ~answers.finished.all()

    return jax.lax.while_loop(unfinished, functools.partial(advance, params, config), answers)


begin = jit(choose_first, static_argnames="answer_capacity", donate_argnames="state")
run = jit(_run, static_argnames="config", donate_argnames="answers")
advance_once = jit(advance, static_argnames="config", donate_argnames="answers")


def stream(params: dict, config: FamilyConfig, answers: Answers, limit: int) -> Iterator[Answers]:
    """Yields the answers after every token, including the first, until all stop or `limit` tokens are written.

    The next step donates the yielded value: read what you need before you continue.
    """
    yield answers
    for _ in range(limit - 1):
        if bool(answers.finished.all()):
            return
        answers = advance_once(params, config, answers)
        yield answers
