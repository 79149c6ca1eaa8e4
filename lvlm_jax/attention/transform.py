"""The transform protocol: what a method may do inside attention.

A `Site` is one layer of one forward pass. Attention goes through five stages

    positions → logits → mask → weights → values

and a transform overrides the stages it needs. Each stage receives the result of the stage before and returns a
replacement of the same shape. The site keeps the results so far: `site.logits` are the edited logits once the logits
stage is over. Stages see only the rows (`rows`) and layers (`layers`) that the transform names; nothing is traced
elsewhere.

Outside attention, `enter` observes the input of a layer, `mlp` edits the output of its feed-forward block before it is
added to the residual stream, and `residual` edits the stream between two layers. The first two see the layer as a
`Stream`.

Statistics are per sample: reduce over heads, rows and columns, never over the batch axis. All arrays of a site are
float32 or boolean.

The map `[B, H, R, S]` of a long prompt does not fit into memory. A transform whose stages treat every row by itself
sets `by_rows = True` and then gets a few rows at a time. If it needs sums over all rows, it adds them up in
`statistics` and reads them with `over_all_rows` in the stages after the softmax.
"""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.attention.context import Context
from lvlm_jax.attention.lazy_mask import LazyMask
from lvlm_jax.errors import LVLMError

ROWS = ("all", "post_image", "last")
# The positions stage is not among them: a method sets positions for all layers.
ATTENTION_STAGES = ("logits", "mask", "weights", "values", "observe")
# These act outside attention, in all rows of a call.
STREAM_STAGES = ("enter", "mlp", "residual")
STAGES = (*ATTENTION_STAGES, *STREAM_STAGES)
NEAR = 0.83  # a name with at least this difflib ratio is a misspelling: "logit", "wieghts", but not "masked"


@dataclasses.dataclass(frozen=True)
class Site:
    """One layer of one forward pass of one branch, as a stage sees it.

    B samples, R explicit rows (queries), S columns (keys), H query heads, K key/value heads, D head size.

    Attributes:
        layer, num_layers: index of this layer, from 0; number of layers.
        phase: "prefill" or "decode".
        image_id: per column: 0 for text, k >= 1 for the k-th image, -1 for padding and columns that are not written
            yet.
        image: columns that are image tokens.
        image_count: the largest number of images in a sample; static.
        after_image: columns that are text after the last image.
        system: columns that are text before the first image.
        generated: columns written after the prompt; none in a prefill.
        row_index: the column index of each row.
        post_image: rows after the last image.
        mask: which columns each row sees.
        logits: scaled attention logits, with the edits so far.
        carry: this branch's state, passed from layer to layer within one forward pass.
        statistics: sums of `Transform.statistics` over all rows, if this site has only some of the rows; else None.
        read_values: returns the values of all columns, for the rare stage that needs them one by one.
        project: applies the layer's output projection to heads' outputs: `[B, H, R, D]` to `[B, R, E]`.
    """

    layer: int
    num_layers: int
    phase: str
    image_id: Int[Array, "B S"]
    image_count: int
    image: Bool[Array, "B S"]
    after_image: Bool[Array, "B S"]
    system: Bool[Array, "B S"]
    generated: Bool[Array, "B S"]
    row_index: Int[Array, "R"]
    post_image: Bool[Array, "B R"]
    mask: Bool[Array, "B R S"]
    logits: Float[Array, "B H R S"]
    carry: Any
    read_values: Callable[[], Float[Array, "B K S D"]]
    project: Callable[[Float[Array, "B H R D"]], Float[Array, "B R E"]]
    statistics: Any = None


@dataclasses.dataclass(frozen=True)
class Stream:
    """One layer of one forward pass of one branch outside attention, as `enter` and `mlp` see it.

    Attributes:
        layer, num_layers: index of this layer, from 0; number of layers.
        phase: "prefill" or "decode".
        layer_input: the input of the layer.
        mlp_input: the normalised input of the feed-forward block; None in `enter`, which runs before attention.
        carry: this branch's state, as in `Site`.
        input_norm, mlp_norm: the norms before attention and before the feed-forward block.
        feed_forward: the feed-forward block.
        exit_logits: maps hidden states to next-token logits, through the final norm.
    """

    layer: int
    num_layers: int
    phase: str
    layer_input: Float[Array, "B T E"]
    mlp_input: Float[Array, "B T E"] | None
    carry: Any
    input_norm: Callable[[Float[Array, "*T E"]], Float[Array, "*T E"]]
    mlp_norm: Callable[[Float[Array, "*T E"]], Float[Array, "*T E"]]
    feed_forward: Callable[[Float[Array, "*T E"]], Float[Array, "*T E"]]
    exit_logits: Callable[[Float[Array, "*T E"]], Float[Array, "*T V"]]


class Transform:
    """Attention edits of one branch; this base class edits nothing.

    Attributes:
        rows: which prefill rows the stages need: "last" (the last prompt token), "post_image" (prompt rows after the
            last image; earlier rows may be among them, see `site.post_image`) or "all". A decode step always has
            exactly one row.
        by_rows: True if the stages edit a row in the same way whichever rows come with it, except for `statistics`.
            They may then get a few rows at a time. The carry for the next layer is what `observe` returns for the last
            of these calls, so no stage may use what `observe` computes in the same layer.
        image_rows: True if the stages edit rows of image tokens only and leave rows of text as they are.
    """

    rows: ClassVar[str] = "post_image"
    by_rows: ClassVar[bool] = False
    image_rows: ClassVar[bool] = False

    def __init_subclass__(cls, **settings):
        super().__init_subclass__(**settings)
        check_definition(cls)

    def layers(self, num_layers: int) -> range:
        """The layers in which the attention stages run."""
        return range(num_layers)

    def active(self, layer: int, num_layers: int, phase: str) -> bool:
        """Whether the stages run in this layer and phase; static. A prefill-only method overrides it."""
        return layer in self.layers(num_layers)

    def begin(self, context: Context, embeddings: Float[Array, "B T E"]) -> Any:
        """The carry of this branch before the first layer (a pytree of arrays), given the input of that layer."""
        return ()

    def logits(self, site: Site, logits: Float[Array, "B H R S"]) -> Float[Array, "B H R S"]:
        """Edits attention logits before mask and softmax."""
        return logits

    def mask(self, site: Site, mask: Bool[Array, "B #H R S"]) -> Bool[Array, "B #H R S"]:
        """Edits which columns a row sees, for all heads or per head."""
        return mask

    def weights(self, site: Site, weights: Float[Array, "B H R S"]) -> Float[Array, "B H R S"]:
        """Edits attention weights after the softmax. Edits that are linear in the values belong here: they cost no
        extra read."""
        return weights

    def values(self, site: Site, weights: Float[Array, "B H R S"], mix: Callable) -> Float[Array, "B H R D"]:
        """Turns weights into outputs. `mix(weights)` is the product with the values; each call reads them once."""
        return mix(weights)

    def observe(self, site: Site, weights: Float[Array, "B H R S"]) -> Any:
        """The carry for the next layer, given this layer's edited logits and unedited weights."""
        return site.carry

    def mixture(
        self, layer: int, num_layers: int, context: Context, carry: Any, mask: LazyMask
    ) -> tuple[tuple[Any, LazyMask], ...] | None:
        """A layer's attention as a sum of plain attentions under other masks, if it is one: pairs of weight and mask.

        With `rows = "all"`, a long sequence is then computed without its map, and the stages do not run: they must say
        the same. A weight is broadcast to the output [B, H, T, D]. If a subclass overrides stages, its own apply.

        Args:
            context: of all rows of the call.
            mask: which columns each row sees without this transform.
        """
        return None

    def statistics(self, site: Site, weights: Float[Array, "B H R S"]) -> Any:
        """A pytree of sums over the rows, given the edited logits and the unedited weights."""
        return None

    def over_all_rows(self, site: Site, weights: Float[Array, "B H R S"]) -> Any:
        """`statistics` over all rows, for the stages after the softmax, even if this site has only some of the rows."""
        return self.statistics(site, weights) if site.statistics is None else site.statistics

    def enter(self, stream: Stream) -> Any:
        """Observes the input of a layer before its attention; returns the carry from here on. Called in every layer."""
        return stream.carry

    def mlp(self, stream: Stream, output: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Edits the output of a layer's feed-forward block before it joins the residual stream, in all rows."""
        return output

    def residual(self, layer: int, num_layers: int, phase: str, hidden: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Edits the residual stream after layer `layer`, in all rows of the call."""
        return hidden

    @property
    def parts(self) -> tuple["Transform", ...]:
        """The transforms that this one consists of: itself, unless it joins or wraps others."""
        return (self,)

    def attends(self) -> bool:
        """Whether any attention stage is overridden."""
        return any(overrides(self, stage) for stage in ATTENTION_STAGES)


def check_definition(cls: type[Transform]) -> None:
    """Refuses a class with an invalid `rows` or a misspelt stage: such a method would do nothing.

    Raises:
        LVLMError: `rows` is not in ROWS, or a public name almost equals that of a stage or another hook.
    """
    rows = vars(cls).get("rows", ROWS[0])
    rows = rows.default if isinstance(rows, dataclasses.Field) else rows
    if not isinstance(rows, property) and rows not in ROWS:
        raise LVLMError(f"{cls.__name__}: rows is {rows!r}; expected one of {', '.join(map(repr, ROWS))}")
    hooks = {name.lower(): name for base in cls.__mro__[1:-1] for name in vars(base) if name[0] != "_"}
    fields = vars(cls).get("__annotations__", {})
    for name in vars(cls):
        if name[0] == "_" or name in hooks.values() or name in fields:
            continue
        if near := difflib.get_close_matches(name.lower(), hooks, n=1, cutoff=NEAR):
            raise LVLMError(
                f"{cls.__name__} has {name}, which nothing calls; name it {hooks[near[0]]} if that is what it is, "
                f"or _{name} if it is a helper"
            )


def overrides(transform: Transform, stage: str) -> bool:
    """Whether a transform, or any member of a chain, overrides a stage of the base class."""
    return any(getattr(type(part), stage) is not getattr(Transform, stage) for part in transform.parts)


def mixes(transform: Transform) -> bool:
    """Whether `Transform.mixture` speaks for a transform: no subclass of the class that defines it has other stages."""
    defined = {}
    for cls in reversed(type(transform).__mro__):
        defined |= dict.fromkeys(vars(cls), cls)
    return all(issubclass(defined["mixture"], defined[stage]) for stage in ATTENTION_STAGES)


def rows_in(transform: Transform, layer: int, num_layers: int, phase: str) -> str:
    """The rows that a transform needs in a layer: those of its members that act there."""
    return min((member.rows for member in _active_members(transform, layer, num_layers, phase)), key=ROWS.index)


def _active_members(transform: Transform, layer: int, num_layers: int, phase: str) -> list[Transform]:
    """The members of a transform that edit attention in a layer."""
    members = transform.members if isinstance(transform, Chain) else (transform,)
    return [member for member in members if member.attends() and member.active(layer, num_layers, phase)]


def splits_by_rows(transform: Transform, layer: int, num_layers: int, phase: str) -> bool:
    """Whether a transform may get a few rows at a time in a layer; see `Transform.by_rows`.

    A chain may if its members use the same rows, at most one member has statistics, and no member before that one
    edits weights.
    """
    members = _active_members(transform, layer, num_layers, phase)
    counting = [index for index, member in enumerate(members) if overrides(member, "statistics")]
    edited = any(overrides(member, "weights") for member in members[: counting[0]]) if counting else False
    alike = all(member.by_rows and member.rows == members[0].rows != "last" for member in members)
    return alike and len(counting) < 2 and not edited


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chain(Transform):
    """Transforms of one branch, applied one after another in every stage. The carry is a tuple with one entry per
    member."""

    members: tuple[Transform, ...]

    def __post_init__(self):
        mixing = [type(member).__name__ for member in self.members if overrides(member, "values")]
        if len(mixing) > 1:
            raise LVLMError(f"{' and '.join(mixing)} cannot be chained: each replaces the product with the values")

    @property
    def parts(self) -> tuple[Transform, ...]:
        return tuple(part for member in self.members for part in member.parts)

    @property
    def rows(self) -> str:
        return min((member.rows for member in self.members), key=ROWS.index)

    def active(self, layer: int, num_layers: int, phase: str) -> bool:
        return any(member.active(layer, num_layers, phase) for member in self.members)

    def begin(self, context, embeddings) -> tuple:
        return tuple(member.begin(context, embeddings) for member in self.members)

    def logits(self, site: Site, logits):
        for member, own in self._at(site):
            own = dataclasses.replace(own, logits=logits)
            edited = member.logits(narrow_site(own, member), own_rows(logits, member))
            logits = with_own_rows(logits, edited, member)
        return logits

    def mask(self, site: Site, mask):
        for member, own in self._at(site):
            edited = member.mask(narrow_site(own, member), own_rows(mask, member))
            heads = max(mask.shape[1], edited.shape[1])
            mask = jnp.broadcast_to(mask, (mask.shape[0], heads, *mask.shape[2:]))
            mask = with_own_rows(mask, jnp.broadcast_to(edited, (*mask.shape[:2], *edited.shape[2:])), member)
        return mask

    def weights(self, site: Site, weights):
        for member, own in self._at(site):
            edited = member.weights(narrow_site(own, member), own_rows(weights, member))
            weights = with_own_rows(weights, edited, member)
        return weights

    def values(self, site: Site, weights, mix):
        for member, own in self._at(site):
            if overrides(member, "values"):
                if member.rows != "last" or weights.shape[2] == 1:
                    return member.values(own, weights, mix)
                last = member.values(narrow_site(own, member), weights[:, :, -1:], mix)
                return jnp.concatenate([mix(weights[:, :, :-1]), last], axis=2)
        return mix(weights)

    def observe(self, site: Site, weights) -> tuple:
        carries = list(site.carry)
        for index, member in enumerate(self.members):
            if member.active(site.layer, site.num_layers, site.phase):
                own = dataclasses.replace(narrow_site(site, member), carry=site.carry[index])
                carries[index] = member.observe(own, own_rows(weights, member))
        return tuple(carries)

    def statistics(self, site: Site, weights):
        """The statistics of the one member that has any."""
        statistics = [
            member.statistics(own, weights) for member, own in self._at(site) if overrides(member, "statistics")
        ]
        return statistics[0] if statistics else None

    def enter(self, stream: Stream) -> tuple:
        pairs = zip(self.members, stream.carry, strict=True)
        return tuple(member.enter(dataclasses.replace(stream, carry=carry)) for member, carry in pairs)

    def mlp(self, stream: Stream, output):
        for member, carry in zip(self.members, stream.carry, strict=True):
            output = member.mlp(dataclasses.replace(stream, carry=carry), output)
        return output

    def residual(self, layer, num_layers, phase, hidden):
        for member in self.members:
            hidden = member.residual(layer, num_layers, phase, hidden)
        return hidden

    def _at(self, site: Site):
        for member, carry in zip(self.members, site.carry, strict=True):
            if member.active(site.layer, site.num_layers, site.phase):
                yield member, dataclasses.replace(site, carry=carry)


def own_rows(array: Array, transform: Transform) -> Array:
    """Selects a transform's rows from an array `[B, ?, R, ...]` with the rows of all transforms."""
    return array[:, :, -1:] if transform.rows == "last" else array


def with_own_rows(array: Array, edited: Array, transform: Transform) -> Array:
    """`array` with the rows of `own_rows` replaced."""
    if edited.shape[2] == array.shape[2]:
        return edited
    return jnp.concatenate([array[:, :, :-1], edited], axis=2)


def narrow_site(site: Site, transform: Transform) -> Site:
    """The site with only the rows of a transform (see `Transform.rows`)."""
    if transform.rows != "last":
        return site
    return dataclasses.replace(
        site,
        logits=site.logits[:, :, -1:],
        mask=site.mask[:, -1:],
        post_image=site.post_image[:, -1:],
        row_index=site.row_index[-1:],
    )
