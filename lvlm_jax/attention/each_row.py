"""Edits every row of a known answer as the decode step for that row would.

A decode step sees one row and the columns up to it. Under teacher forcing all rows of an answer run at once. `EachRow`
wraps a transform and treats each row as its own step: stages are mapped over the rows, and columns after a row count
as not written yet. So `rows = "last"` is true of every row, a statistic over rows is taken over one row, and every row
has its own carry.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.attention.context import PADDING
from lvlm_jax.attention.transform import Site, Stream, Transform

CARRY, ROW = 0, 2  # the axis of rows in a carry, and in arrays shaped like an attention map


def map_rows(
    edit: Callable[[Site, Any], Any],
    site: Site,
    array: Float[Array, "B H R S"] | Bool[Array, "B #H R S"],
    columns: Int[Array, "B R"] | None = None,
    carry_axis: int | None = CARRY,
    out_axis: int = ROW,
) -> Any:
    """Applies `edit` to each row of a site by itself.

    Args:
        edit: a stage.
        array: the stage's second argument, an attention map or a mask; `edit` gets one row of it.
        columns: the column of each row; columns after it count as not written yet. The default is `site.row_index`. If
            given, the columns may differ between samples, and the site's `row_index` is None.
        carry_axis: the axis of rows in `site.carry`; None if all rows share one carry.
        out_axis: the axis of rows in the result.
    """
    same_columns = columns is None
    columns = jnp.broadcast_to(site.row_index, site.mask.shape[:2]) if same_columns else columns

    def edit_row(column: Array, logits: Array, mask: Array, post_image: Array, carry: Any, part: Array) -> Any:
        visible = jnp.arange(site.image_id.shape[1]) <= column[:, None]
        row_site = dataclasses.replace(
            site,
            phase="decode",
            image_id=jnp.where(visible, site.image_id, PADDING),
            image=site.image & visible,
            after_image=site.after_image & visible,
            system=site.system & visible,
            generated=site.generated & visible,
            row_index=column[:1] if same_columns else None,
            post_image=post_image[:, None],
            mask=mask[:, None],
            logits=logits[:, :, None],
            carry=carry,
        )
        edited = edit(row_site, part[:, :, None])
        return edited[:, :, 0] if out_axis == ROW else edited

    axes = (1, ROW, 1, 1, carry_axis, ROW)
    each = jax.vmap(edit_row, in_axes=axes, out_axes=out_axis)
    return each(columns, site.logits, site.mask, site.post_image, site.carry, array)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EachRow(Transform):
    """Wraps a transform to treat each row of a call as a separate decode step; its carry has a leading axis of rows."""

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
        def begin_row(row: Int[Array, ""], hidden: Float[Array, "B E"]) -> Any:
            visible = jnp.arange(context.image_id.shape[1]) <= context.first_row + row
            cut = dataclasses.replace(context.cut(row, 1), explicit_rows=1)
            own = dataclasses.replace(cut, image_id=jnp.where(visible, context.image_id, PADDING))
            return self.transform.begin(own, hidden[:, None])

        return jax.vmap(begin_row, in_axes=(0, 1))(jnp.arange(embeddings.shape[1]), embeddings)

    def logits(self, site, logits):
        return map_rows(self.transform.logits, site, logits)

    def mask(self, site, mask):
        return map_rows(self.transform.mask, site, mask)

    def weights(self, site, weights):
        return map_rows(self.transform.weights, site, weights)

    def values(self, site, weights, mix):
        return map_rows(lambda own, row: self.transform.values(own, row, mix), site, weights)

    def observe(self, site, weights):
        return map_rows(self.transform.observe, site, weights, out_axis=CARRY)

    def enter(self, stream):
        return _map_stream_rows(lambda own, _: self.transform.enter(own), stream, stream.layer_input, out_axis=CARRY)

    def mlp(self, stream, output):
        return _map_stream_rows(lambda own, row: self.transform.mlp(own, row)[:, 0], stream, output)

    def residual(self, layer, num_layers, phase, hidden):
        def edit_row(row: Float[Array, "B E"]) -> Float[Array, "B E"]:
            return self.transform.residual(layer, num_layers, phase, row[:, None])[:, 0]

        return jax.vmap(edit_row, in_axes=1, out_axes=1)(hidden)


def _map_stream_rows(edit: Callable, stream: Stream, array: Float[Array, "B T E"], out_axis: int = 1) -> Any:
    """Applies `edit` to each row of a stream by itself, with that row of `array`."""
    has_mlp_input = stream.mlp_input is not None

    def edit_row(entered: Array, read: Array | None, carry: Any, part: Array) -> Any:
        row_stream = dataclasses.replace(
            stream, layer_input=entered[:, None], mlp_input=read[:, None] if has_mlp_input else None, carry=carry
        )
        return edit(row_stream, part[:, None])

    axes = (1, 1 if has_mlp_input else None, CARRY, 1)
    return jax.vmap(edit_row, in_axes=axes, out_axes=out_axis)(
        stream.layer_input, stream.mlp_input, stream.carry, array
    )
