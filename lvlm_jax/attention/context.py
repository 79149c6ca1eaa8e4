"""What every layer of one forward pass shares: columns, rows, masks and positions."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.attention.sight import Sight

PADDING = -1  # image_id of a column that holds no token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """The B sequences of one forward pass: T rows (queries) that see S columns (keys).

    Attributes:
        image_id: per column: 0 text, k >= 1 the k-th image, -1 padding or not written yet.
        positions: ordinary position of each row; where the model counts along several axes, of its first one.
        axes: position of each row along every axis, where prompt rows of the model have several.
        first_row: column index of the first row; rows are consecutive columns.
        image_end: E, the index of the first column after the sample's last image; 0 without an image.
        image_shift: how much further each image column lies for post-image rows, along every axis where there are
            several, than its own position says (the *positions* stage), zero elsewhere; None when all positions are
            ordinary, or when the cached image keys are turned already, as they are in every decode step.
        answer_start: the column in which the answer begins; None where there is none, as in a prefill.
        image_count: no sample has more images; static, so that a statistic may have an axis of images.
        phase: "prefill" or "decode".
        streams: whether attention goes by blocks (`stream`), which holds no T x S map and skips most of what lies above
            the diagonal, but rounds otherwise than in one piece.
        explicit_rows: how many of the last rows a method's stages may touch; includes every post-image row.
    """

    image_id: Int[Array, "B S"]
    positions: Int[Array, "B T"]
    first_row: Int[Array, ""]
    image_end: Int[Array, "B"]
    axes: Int[Array, "A B T"] | None = None
    image_shift: Float[Array, "*A B S"] | None = None
    answer_start: Int[Array, ""] | None = None
    image_count: int = dataclasses.field(default=1, metadata={"static": True})
    streams: bool = dataclasses.field(default=False, metadata={"static": True})
    phase: str = dataclasses.field(default="prefill", metadata={"static": True})
    explicit_rows: int = dataclasses.field(default=0, metadata={"static": True})

    def mask(self, window: int | None = None, whole_images: bool = False) -> Bool[Array, "B T S"]:
        """Which columns a row sees; see `sight`."""
        return self.sight(window, whole_images).mask()

    def sight(self, window: int | None = None, whole_images: bool = False) -> Sight:
        """Which columns a row sees: itself and earlier tokens, within a sliding window if the layer has one.

        With `whole_images` image tokens of the prompt see later ones of their uninterrupted run too. The window bounds
        how far back they see, as it does for text.
        """
        image = self.image_columns() if whole_images and self.phase == "prefill" else None
        return Sight.of(self.rows(), self.image_id != PADDING, window, image)

    def cut(self, start: int | Int[Array, ""], rows: int) -> "Context":
        """The same columns, and only `rows` rows from the `start`-th on, as many of them explicit as there were."""
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
        """What was written after the prompt."""
        if self.answer_start is None:
            return jnp.zeros(self.image_id.shape, bool)
        return (jnp.arange(self.image_id.shape[1]) >= self.answer_start) & (self.image_id != PADDING)

    def system_columns(self) -> Bool[Array, "B S"]:
        """Text before the first image; none in a sample without an image."""
        before = jnp.cumsum(self.image_id > 0, axis=1) == 0
        return before & (self.image_id == 0) & (self.image_end[:, None] > 0)

    def post_image_rows(self) -> Bool[Array, "B R"]:
        """Which of the explicit rows lie after the last image; none in a sample without an image."""
        rows = self.rows()[self.positions.shape[1] - self.explicit_rows :]
        return (rows[None, :] >= self.image_end[:, None]) & (self.image_end[:, None] > 0)

    def rows(self) -> Int[Array, "T"]:
        """Column index of each row."""
        return self.first_row + jnp.arange(self.positions.shape[1])


def image_end(image_id: Int[Array, "B S"]) -> Int[Array, "B"]:
    """E: per sample the index after its last image token, 0 when it has none."""
    columns = jnp.arange(1, image_id.shape[1] + 1)
    return jnp.max(jnp.where(image_id > 0, columns, 0), axis=1).astype(jnp.int32)
