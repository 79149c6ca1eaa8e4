"""The state that a generation carries from token to token."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lvlm_jax.attention import Context, LayerCache, Tap, Tapped
from lvlm_jax.methods import Method


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
    """The decoder's input before the answer.

    Attributes:
        embeddings: token embeddings, with image tokens in their places.
        image_id: per column: 0 for text, k >= 1 for the k-th image, -1 for padding.
        axes: position along every axis, if the model has several.
    """

    embeddings: Float[Array, "B T E"]
    image_id: Int[Array, "B T"]
    axes: Int[Array, "A B T"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """Next-token logits of one step.

    Attributes:
        main: logits of the main branch.
        contrast: logits of the contrast branch, None without one.
        combined: the logits to sample from: the method's combination, -inf for tokens that are ruled out.
        tapped: the arrays that the state's `Tap` requests.
    """

    main: Float[Array, "B V"]
    contrast: Float[Array, "B V"] | None
    combined: Float[Array, "B V"]
    tapped: Tapped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Track:
    """The columns written so far, and where the next token goes.

    Attributes:
        image_id: per column, as in `Prompt`; -1 also for columns that are not written yet.
        image_end: per sample, the first column after its last image; 0 without an image.
        position: ordinary position of the next token.
        index: column of the next token, the same for all samples.
        answer_start: column of the answer's first token.
        image_count: see `Context`.
    """

    image_id: Int[Array, "B C"]
    image_end: Int[Array, "B"]
    position: Int[Array, "B"]
    index: Int[Array, ""]
    answer_start: Int[Array, ""]
    image_count: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def after(cls, prompt: Prompt, context: Context, capacity: int) -> "Track":
        """The track right after a prompt."""
        image_id = prompt.image_id
        total = image_id.shape[1]
        if prompt.axes is None:
            position = (image_id >= 0).sum(axis=1, dtype=jnp.int32)
        else:
            position = jnp.where(image_id >= 0, prompt.axes, -1).max(axis=(0, 2)).astype(jnp.int32) + 1
        return cls(
            image_id=jnp.pad(image_id, ((0, 0), (0, capacity - total)), constant_values=-1),
            image_end=context.image_end,
            position=position,
            index=jnp.asarray(total, jnp.int32),
            answer_start=jnp.asarray(total, jnp.int32),
            image_count=context.image_count,
        )

    def with_token(self) -> "Track":
        """The track after one more text token."""
        text = jnp.zeros((self.image_id.shape[0], 1), self.image_id.dtype)
        return dataclasses.replace(
            self,
            image_id=jax.lax.dynamic_update_slice(self.image_id, text, (0, self.index)),
            position=self.position + 1,
            index=self.index + 1,
        )

    def newest(self) -> Context:
        """The context of the newest token's row."""
        return Context(
            image_id=self.image_id,
            positions=self.position[:, None] - 1,
            first_row=self.index - 1,
            image_end=self.image_end,
            answer_start=self.answer_start,
            image_count=self.image_count,
            phase="decode",
            explicit_rows=1,
        )

    def with_tokens(self, count: int) -> Context:
        """The context of `count` further rows, all at once."""
        text = jnp.zeros((self.image_id.shape[0], count), self.image_id.dtype)
        return Context(
            image_id=jax.lax.dynamic_update_slice(self.image_id, text, (0, self.index)),
            positions=self.position[:, None] + jnp.arange(count, dtype=self.position.dtype),
            first_row=self.index,
            image_end=self.image_end,
            answer_start=self.answer_start,
            image_count=self.image_count,
            phase="decode",
            explicit_rows=count,
        )


class Memory(NamedTuple):
    """The memory of a method from step to step; pytrees of arrays `[B, ...]`.

    Attributes:
        logits: memory of `Method.start` and `Method.combine`.
        edits: memory of `Method.remember`; None before the prompt runs.
    """

    logits: Any
    edits: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Caches and counters after some tokens.

    Attributes:
        caches: one per layer. If the method moves image tokens, image keys are rotated to the new positions.
        tracks: one for all branches, or one for each branch if the contrast branch's prompt has another layout.
        method: the method, or None.
        memory: the method's memory from step to step.
        tap: what steps return besides logits.
    """

    caches: tuple[LayerCache, ...]
    tracks: tuple[Track, ...]
    method: Method | None
    memory: Memory
    tap: Tap = dataclasses.field(metadata={"static": True})

    @property
    def image_id(self) -> Int[Array, "B C"]:
        """`image_id` of the main branch's columns."""
        return self.tracks[0].image_id

    @property
    def position(self) -> Int[Array, "B"]:
        """The ordinary position of the main branch's next token."""
        return self.tracks[0].position

    @property
    def index(self) -> Int[Array, ""]:
        """The column of the main branch's next token."""
        return self.tracks[0].index

    @property
    def capacity(self) -> int:
        """How many columns the main branch's caches hold."""
        return self.image_id.shape[1]
