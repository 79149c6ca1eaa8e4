"""What a generation carries from token to token."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from lvlm_jax.attention import LayerCache
from lvlm_jax.methods import Method


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """Next-token logits of one step.

    Attributes:
        main: of the main branch.
        contrast: of the contrast branch, None without one.
        combined: what to sample from: the method's combination, -inf where a token is ruled out.
        attention: weights of the last row, head by head, over all columns, per layer and branch; None unless
            the state was started with `tap=True`.
    """

    main: Float[Array, "B V"]
    contrast: Float[Array, "B V"] | None
    combined: Float[Array, "B V"]
    attention: Float[Array, "L N B H C"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Caches and counters after some tokens.

    Attributes:
        caches: per layer. Image keys are turned to the method's calibrated positions, if it has any.
        image_id: per column, -1 where nothing is written yet.
        image_end: E per sample, 0 without an image.
        position: ordinary position of the next token.
        index: column of the next token, the same for all samples.
        method: the method, or None.
        memory: what the method keeps from step to step.
        tap: whether steps return attention weights.
    """

    caches: tuple[LayerCache, ...]
    image_id: Int[Array, "B C"]
    image_end: Int[Array, "B"]
    position: Int[Array, "B"]
    index: Int[Array, ""]
    method: Method | None
    memory: Any
    tap: bool = dataclasses.field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        """How many columns the caches hold."""
        return self.image_id.shape[1]
