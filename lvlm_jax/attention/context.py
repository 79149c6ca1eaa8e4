"""Arrays that all layers of one forward pass share: columns, rows, masks and positions."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.attention.lazy_mask import LazyMask

PADDING = -1  # image_id of a column without a token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """The B sequences of one forward pass: T rows (queries) that attend to S columns (keys).

    Attributes:
        image_id: per column: 0 for text, k >= 1 for the k-th image, -1 for padding and columns that are not written
            yet.
        positions: ordinary position of each row; the first axis if the model has several.
        axes: position of each row along every axis, for prompt rows of a model that has several.
        first_row: column index of the first row; rows are consecutive columns.
        image_end: E, the index of the first column after the sample's last image; 0 without an image.
        image_shift: for post-image rows, how far each image column is moved from its own position (the *positions*
            stage), along every axis if there are several; zero elsewhere. None if all positions are ordinary, or if the
            cached image keys are rotated already, as in every decode step.
        answer: which of several answers to one prompt each column belongs to, from 1; 0 for the prompt. Answers do not
            see each other. None if there is one answer at most.
        answer_start: the column in which the answer begins; None in a prefill.
        image_count: the largest number of images in a sample; static, so that a statistic may have an axis of images.
        phase: "prefill" or "decode".
        streams: whether attention runs block by block (`stream`): no T x S map in memory and little work above the
            diagonal, but sums are rounded in another order.
        explicit_rows: how many of the last rows a method's stages may edit; includes every post-image row.
    """

    image_id: Int[Array, "B S"]
    positions: Int[Array, "B T"]
    first_row: Int[Array, ""]
    image_end: Int[Array, "B"]
    axes: Int[Array, "A B T"] | None = None
    image_shift: Float[Array, "*A B S"] | None = None
    answer: Int[Array, "B S"] | None = None
    answer_start: Int[Array, ""] | None = None
    image_count: int = dataclasses.field(default=1, metadata={"static": True})
    streams: bool = dataclasses.field(default=False, metadata={"static": True})
    phase: str = dataclasses.field(default="prefill", metadata={"static": True})
    explicit_rows: int = dataclasses.field(default=0, metadata={"static": True})

    def mask(self, window: int | None = None, whole_images: bool = False) -> Bool[Array, "B T S"]:
        """Which columns each row sees; see `lazy_mask`."""
        return self.lazy_mask(window, whole_images).mask()

    def lazy_mask(self, window: int | None = None, whole_images: bool = False) -> LazyMask:
        """Each row sees itself and earlier tokens, within a sliding window if the layer has one.

        With `whole_images`, image tokens of the prompt also see later tokens of their uninterrupted run. The window
        limits how far back they see, as for text.
        """
        image = self.image_columns() if whole_images and self.phase == "prefill" else None
        return LazyMask.of(self.rows(), self.image_id != PADDING, window, image, self.answer)

    def cut(self, start: int | Int[Array, ""], rows: int) -> "Context":
        """The same columns with only `rows` rows, beginning with row `start`; explicit rows stay explicit."""
        explicit = min(rows, self.explicit_rows)
        axes = None if self.axes is None else jax.lax.dynamic_slice_in_dim(self.axes, start, rows, axis=2)
        return dataclasses.replace(
            self,
            positions=jax.lax.dynamic_slice_in_dim(self.positions, start, rows, axis=1),
            axes=axes,
            first_row=self.first_row + start,
            explicit_rows=explicit,
        )

    def image_columns(self) -> Bool[Array, "B S"]:
        return self.image_id > 0

    def after_image_columns(self) -> Bool[Array, "B S"]:
        """Text after the last image; none in a sample without an image."""
        columns = jnp.arange(self.image_id.shape[1])
        after = (columns[None, :] >= self.image_end[:, None]) & (self.image_end[:, None] > 0)
        return after & (self.image_id != PADDING)

    def generated_columns(self) -> Bool[Array, "B S"]:
        """Columns written after the prompt."""
        if self.answer_start is None:
            return jnp.zeros(self.image_id.shape, bool)
        return (jnp.arange(self.image_id.shape[1]) >= self.answer_start) & (self.image_id != PADDING)

    def system_columns(self) -> Bool[Array, "B S"]:
        """Text before the first image; none in a sample without an image."""
        before = jnp.cumsum(self.image_id > 0, axis=1) == 0
        return before & (self.image_id == 0) & (self.image_end[:, None] > 0)

    def post_image_rows(self) -> Bool[Array, "B R"]:
        """Which explicit rows lie after the last image; none in a sample without an image."""
        rows = self.rows()[self.positions.shape[1] - self.explicit_rows :]
        return (rows[None, :] >= self.image_end[:, None]) & (self.image_end[:, None] > 0)

    def rows(self) -> Int[Array, "T"]:
        """The column index of each row."""
        return self.first_row + jnp.arange(self.positions.shape[1])


def image_end(image_id: Int[Array, "B S"]) -> Int[Array, "B"]:
    """E, for each sample: the index after its last image token; 0 without an image."""
    columns = jnp.arange(1, image_id.shape[1] + 1)
    return jnp.max(jnp.where(image_id > 0, columns, 0), axis=1).astype(jnp.int32)
