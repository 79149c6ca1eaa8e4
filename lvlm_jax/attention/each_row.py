"""Rows of an answer that is known already, each edited as the decode step that writes it edits its own.

A decode step sees one row and the columns up to it. Under teacher forcing all rows of an answer are run at once, and
`EachRow` makes of a transform one that treats each of them as its step would: stages are mapped over the rows, and for
each row the columns behind it are not written yet. So `rows = "last"` holds in every row, a statistic over rows is
taken of one, and every row has a carry of its own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.attention.context import PADDING
from lvlm_jax.attention.transform import Site, Stream, Transform

CARRY, ROW = 0, 2  # the axis of rows in a carry, and in what has the shape of a map


def one_by_one(
    edit: Callable[[Site, Any], Any],
    site: Site,
    array: Float[Array, "B H R S"] | Bool[Array, "B #H R S"],
    columns: Int[Array, "B R"] | None = None,
    carry_axis: int | None = CARRY,
    out_axis: int = ROW,
) -> Any:
    """What `edit` makes of each row of a site by itself, and of that row of `array`, which may be a mask.

    Args:
        edit: a stage.
        columns: which column each row is; those behind it are not written yet. By default `site.row_index`; where they
            differ between samples an edit has no `row_index`.
        carry_axis: of rows in `site.carry`; None where all rows have one.
        out_axis: of rows in the result.
    """
    alike = columns is None
    columns = jnp.broadcast_to(site.row_index, site.mask.shape[:2]) if alike else columns

    def alone(column: Array, logits: Array, mask: Array, post_image: Array, carry: Any, part: Array) -> Any:
        written = jnp.arange(site.image_id.shape[1]) <= column[:, None]
        own = dataclasses.replace(
            site,
            phase="decode",
            image_id=jnp.where(written, site.image_id, PADDING),
            image=site.image & written,
            after_image=site.after_image & written,
            system=site.system & written,
            generated=site.generated & written,
            row_index=column[:1] if alike else None,
            post_image=post_image[:, None],
            mask=mask[:, None],
            logits=logits[:, :, None],
            carry=carry,
        )
        found = edit(own, part[:, :, None])
        return found[:, :, 0] if out_axis == ROW else found

    axes = (1, ROW, 1, 1, carry_axis, ROW)
    each = jax.vmap(alone, in_axes=axes, out_axes=out_axis)
    return each(columns, site.logits, site.mask, site.post_image, site.carry, array)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EachRow(Transform):
    """A transform that treats each row of a call as a decode step of its own; its carry has a leading axis of rows."""

    transform: Transform

    rows: ClassVar[str] = "all"

    @property
    def parts(self) -> tuple[Transform, ...]:
        return self.transform.parts

    def active(self, layer, num_layers, phase):
        return self.transform.active(layer, num_layers, phase)

    def attends(self) -> bool:
        return self.transform.attends()

    def begin(self, context, embeddings):
        def alone(row: Int[Array, ""], hidden: Float[Array, "B E"]) -> Any:
            written = jnp.arange(context.image_id.shape[1]) <= context.first_row + row
            cut = dataclasses.replace(context.cut(row, 1), explicit_rows=1)
            own = dataclasses.replace(cut, image_id=jnp.where(written, context.image_id, PADDING))
            return self.transform.begin(own, hidden[:, None])

        return jax.vmap(alone, in_axes=(0, 1))(jnp.arange(embeddings.shape[1]), embeddings)

    def logits(self, site, logits):
        return one_by_one(self.transform.logits, site, logits)

    def mask(self, site, mask):
        return one_by_one(self.transform.mask, site, mask)

    def weights(self, site, weights):
        return one_by_one(self.transform.weights, site, weights)

    def values(self, site, weights, mix):
        return one_by_one(lambda own, row: self.transform.values(own, row, mix), site, weights)

    def observe(self, site, weights):
        return one_by_one(self.transform.observe, site, weights, out_axis=CARRY)

    def enter(self, stream):
        return _along(lambda own, _: self.transform.enter(own), stream, stream.entered, out_axis=CARRY)

    def mlp(self, stream, output):
        return _along(lambda own, row: self.transform.mlp(own, row)[:, 0], stream, output)

    def residual(self, layer, num_layers, phase, hidden):
        def alone(row: Float[Array, "B E"]) -> Float[Array, "B E"]:
            return self.transform.residual(layer, num_layers, phase, row[:, None])[:, 0]

        return jax.vmap(alone, in_axes=1, out_axes=1)(hidden)


def _along(edit: Callable, stream: Stream, array: Float[Array, "B T E"], out_axis: int = 1) -> Any:
    """What `edit` makes of each row of a stream by itself, and of that row of `array`."""
    reads = stream.read is not None

    def alone(entered: Array, read: Array | None, carry: Any, part: Array) -> Any:
        own = dataclasses.replace(stream, entered=entered[:, None], read=read[:, None] if reads else None, carry=carry)
        return edit(own, part[:, None])

    axes = (1, 1 if reads else None, CARRY, 1)
    return jax.vmap(alone, in_axes=axes, out_axes=out_axis)(stream.entered, stream.read, stream.carry, array)
