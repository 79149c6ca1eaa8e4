"""The transform protocol: what a method may do inside attention.

One layer of one forward pass is a `Site`. Attention goes through five stages

    positions → logits → mask → weights → values

and a transform overrides those it needs. Each stage receives what the stage before produced and returns a
replacement of the same shape; the site remembers the results so far (`site.logits` are the edited logits once
the logits stage is over). Stages see only the rows they asked for (`rows`) in the layers they asked for
(`layers`); everywhere else nothing is traced.

Statistics are per sample: reduce over heads, rows and columns, never over the batch axis. All arrays of a site are
float32 or boolean.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.errors import LVLMError

ROWS = ("all", "post_image", "last")
STAGES = (
    "logits",
    "mask",
    "weights",
    "values",
    "observe",
)  # positions belong to the method: they hold in all layers


@dataclasses.dataclass(frozen=True)
class Site:
    """One layer of one forward pass of one branch, as a stage sees it.

    B samples, R explicit rows (queries), S columns (keys), H query heads, K key/value heads, D head size.

    Attributes:
        layer, num_layers: index from 0, and how many there are.
        phase: "prefill" or "decode".
        image_id: per column: 0 text, k >= 1 the k-th image, -1 padding or not written yet.
        image: columns that are image tokens.
        after_image: columns that are text after the last image.
        post_image: rows after the last image.
        mask: which columns a row sees.
        logits: attention logits, scaled, as the stages so far left them.
        carry: this branch's state, flowing from layer to layer within one forward pass.
        read_values: returns the values of all columns; for the rare stage that needs them one by one.
    """

    layer: int
    num_layers: int
    phase: str
    image_id: Int[Array, "B S"]
    image: Bool[Array, "B S"]
    after_image: Bool[Array, "B S"]
    post_image: Bool[Array, "B R"]
    mask: Bool[Array, "B R S"]
    logits: Float[Array, "B H R S"]
    carry: Any
    read_values: Callable[[], Float[Array, "B K S D"]]


class Transform:
    """Attention edits of one branch; this base class edits nothing.

    Attributes:
        rows: which prefill rows the stages must see: "last" (the last prompt token), "post_image" (prompt rows
            after the last image; an earlier row may be among them, `site.post_image` tells) or "all".
            A decode step always has exactly its one row.
    """

    rows: ClassVar[str] = "post_image"

    def layers(self, num_layers: int) -> range:
        """The layers whose attention takes this transform's stages."""
        return range(num_layers)

    def active(self, layer: int, num_layers: int, phase: str) -> bool:
        """Whether the stages run in this layer in this phase; static. A prefill-only method overrides it."""
        return layer in self.layers(num_layers)

    def begin(self, context) -> Any:
        """The carry of this branch before the first layer (a pytree of arrays)."""
        return ()

    def logits(self, site: Site, logits: Float[Array, "B H R S"]) -> Float[Array, "B H R S"]:
        """Edits attention logits before mask and softmax."""
        return logits

    def mask(self, site: Site, mask: Bool[Array, "B #H R S"]) -> Bool[Array, "B #H R S"]:
        """Edits which columns a row sees, for all heads or per head."""
        return mask

    def weights(self, site: Site, weights: Float[Array, "B H R S"]) -> Float[Array, "B H R S"]:
        """Edits attention weights after the softmax. Anything linear in the values belongs here: it costs no read."""
        return weights

    def values(self, site: Site, weights: Float[Array, "B H R S"], mix: Callable) -> Float[Array, "B H R D"]:
        """Turns weights into outputs. `mix(weights)` is the product with the values, one read of them each."""
        return mix(weights)

    def observe(self, site: Site, weights: Float[Array, "B H R S"]) -> Any:
        """The carry for the next layer, from this layer's edited logits and the weights before their edit."""
        return site.carry


def overrides(transform: Transform, stage: str) -> bool:
    """Whether a transform (or any member of a chain) replaces a stage of the base class."""
    members = transform.members if isinstance(transform, Chain) else (transform,)
    return any(getattr(type(member), stage) is not getattr(Transform, stage) for member in members)


@dataclasses.dataclass(frozen=True)
class Chain(Transform):
    """Transforms of one branch applied one after another, stage by stage. The carry is a tuple, one entry each."""

    members: tuple[Transform, ...]

    def __post_init__(self):
        mixing = [type(member).__name__ for member in self.members if overrides(member, "values")]
        if len(mixing) > 1:
            raise LVLMError(
                f"{' and '.join(mixing)} cannot be chained: each replaces the product with the values"
            )

    @property
    def rows(self) -> str:
        return min((member.rows for member in self.members), key=ROWS.index)

    def active(self, layer: int, num_layers: int, phase: str) -> bool:
        return any(member.active(layer, num_layers, phase) for member in self.members)

    def begin(self, context) -> tuple:
        return tuple(member.begin(context) for member in self.members)

    def logits(self, site: Site, logits):
        for member, own in self._at(site):
            logits = member.logits(dataclasses.replace(own, logits=logits), logits)
        return logits

    def mask(self, site: Site, mask):
        for member, own in self._at(site):
            mask = member.mask(own, mask)
        return mask

    def weights(self, site: Site, weights):
        for member, own in self._at(site):
            weights = member.weights(own, weights)
        return weights

    def values(self, site: Site, weights, mix):
        for member, own in self._at(site):
            if overrides(member, "values"):
                return member.values(own, weights, mix)
        return mix(weights)

    def observe(self, site: Site, weights) -> tuple:
        running = [member.active(site.layer, site.num_layers, site.phase) for member in self.members]
        return tuple(
            member.observe(dataclasses.replace(site, carry=carry), weights) if on else carry
            for member, carry, on in zip(self.members, site.carry, running, strict=True)
        )

    def _at(self, site: Site):
        for member, carry in zip(self.members, site.carry, strict=True):
            if member.active(site.layer, site.num_layers, site.phase):
                yield member, dataclasses.replace(site, carry=carry)
