"""What a caller asks to see of a forward pass, and what it gets. Nothing else is kept."""

import dataclasses
from typing import NamedTuple

from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Tap:
    """A request, static: another one compiles another program.

    Attributes:
        layers: whose attention weights, after all edits, are returned; None for all of them.
        heads: which heads of them; None for all.
        rows: "last", or "all" rows of the call (a decode step has one).
        mean_heads: averages the chosen heads before anything is kept.
        hidden: residual streams to return for the same rows, numbered as Hugging Face's `hidden_states`:
            0 the embeddings, i what layer i - 1 put out, without the final norm.
        exits: residual streams whose early-exit logits are returned, last row only, behind the final norm.
    """

    layers: tuple[int, ...] | None = ()
    heads: tuple[int, ...] | None = None
    rows: str = "last"
    mean_heads: bool = False
    hidden: tuple[int, ...] = ()
    exits: tuple[int, ...] = ()

    def wants(self, layer: int) -> bool:
        """Whether the attention weights of a layer are asked for."""
        return self.layers is None or layer in self.layers

    def select(self, weights: Float[Array, "B H T S"]) -> Float[Array, "B G R S"]:
        """The heads and rows that were asked for."""
        rows = weights if self.rows == "all" else weights[:, :, -1:]
        chosen = rows if self.heads is None else rows[:, list(self.heads)]
        return chosen.mean(axis=1, keepdims=True) if self.mean_heads else chosen


class Tapped(NamedTuple):
    """What a `Tap` asked for; a field that was not asked for is None.

    N branches, the main one first; attention of the main branch alone where branches have prompts of their own.
    """

    attention: Float[Array, "L N B G R S"] | None
    hidden: Float[Array, "X N B R E"] | None
    exits: Float[Array, "Y N B V"] | None
