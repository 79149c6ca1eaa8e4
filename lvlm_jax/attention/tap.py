"""Requests for attention weights and hidden states of a forward pass, and the arrays that come back."""

import dataclasses
from typing import NamedTuple

from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Tap:
    """A request for arrays that a forward pass returns besides logits. Static: another tap compiles another program.

    Attributes:
        layers: layers whose attention weights are returned, after all edits; None for all layers.
        heads: heads whose weights are returned; None for all.
        rows: "last", or "all" rows of the call (a decode step has one).
        mean_heads: return the mean over the chosen heads.
        hidden: residual streams to return for the same rows, numbered as Hugging Face's `hidden_states`: 0 is the
            embeddings, i the output of layer i - 1, without the final norm.
        exits: residual streams whose early-exit logits are returned, after the final norm, for the last row only.
    """

    layers: tuple[int, ...] | None = ()
    heads: tuple[int, ...] | None = None
    rows: str = "last"
    mean_heads: bool = False
    hidden: tuple[int, ...] = ()
    exits: tuple[int, ...] = ()

    def wants(self, layer: int) -> bool:
        """Whether to return the attention weights of a layer."""
        return self.layers is None or layer in self.layers

    def select(self, weights: Float[Array, "B H T S"]) -> Float[Array, "B G R S"]:
        """The requested heads and rows of attention weights."""
        rows = weights if self.rows == "all" else weights[:, :, -1:]
        chosen = rows if self.heads is None else rows[:, list(self.heads)]
        return chosen.mean(axis=1, keepdims=True) if self.mean_heads else chosen


class Tapped(NamedTuple):
    """The arrays that a `Tap` requests; the others are None.

    N branches, the main one first; attention is that of the main branch alone if branches have prompts of their own.
    """

    attention: Float[Array, "L N B G R S"] | None
    hidden: Float[Array, "X N B R E"] | None
    exits: Float[Array, "Y N B V"] | None
