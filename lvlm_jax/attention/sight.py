"""Which columns rows see, without the T x S mask: what any block of it is made of."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sight:
    """T rows that see S columns: themselves and earlier tokens, of a sliding window where there is one.

    Attributes:
        row, column: indices of columns; -1 for a row that only fills.
        valid: columns that hold a token.
        place, row_place: how many tokens there are up to each column, and up to the one of each row; None without a
            window. Tokens are counted, not columns: between a prompt and its answer some may be unused.
        run, row_run: the uninterrupted run of image tokens (from 1) that each column, or row, belongs to, 0 for text;
            None where image tokens do not see the later ones of their run.
        window: how many tokens back a row sees, itself included.
        causal: whether rows see earlier tokens alone, or all.
    """

    row: Int[Array, "T"]
    column: Int[Array, "S"]
    valid: Bool[Array, "B S"]
    place: Int[Array, "B S"] | None = None
    row_place: Int[Array, "B T"] | None = None
    run: Int[Array, "B S"] | None = None
    row_run: Int[Array, "B T"] | None = None
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    causal: bool = dataclasses.field(default=True, metadata={"static": True})

    @classmethod
    def of(
        cls, row: Int[Array, "T"], valid: Bool[Array, "B S"], window: int | None, image: Bool[Array, "B S"] | None
    ) -> "Sight":
        """Of rows at these columns; `image` are the image tokens where they see later ones."""
        place = run = None
        if window is not None:
            place = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
        if image is not None:
            begins = image & ~jnp.pad(image, ((0, 0), (1, 0)))[:, :-1]
            run = jnp.where(image, jnp.cumsum(begins, axis=1, dtype=jnp.int32), 0)
        own = (None if counted is None else jnp.take(counted, row, axis=1) for counted in (place, run))
        row_place, row_run = own
        column = jnp.arange(valid.shape[1], dtype=jnp.int32)
        return cls(row.astype(jnp.int32), column, valid, place, row_place, run, row_run, window)

    @classmethod
    def everywhere(cls, rows: int, valid: Bool[Array, "B S"]) -> "Sight":
        """Of rows that see every column that holds something: the patches of a picture, with filler behind them."""
        own, column = (jnp.arange(count, dtype=jnp.int32) for count in (rows, valid.shape[1]))
        return cls(own, column, valid, causal=False)

    def mask(self) -> Bool[Array, "B T S"]:
        """Which columns each row sees."""
        if not self.causal:
            return jnp.broadcast_to(
                self.valid[:, None, :], (self.valid.shape[0], self.row.shape[0], self.valid.shape[1])
            )
        visible = (self.column[None, :] <= self.row[:, None])[None]
        if self.run is not None:
            own = self.row_run[:, :, None]
            visible = visible | ((own == self.run[:, None, :]) & (own > 0))
        if self.window is not None:
            visible = visible & (self.place[:, None, :] > self.row_place[:, :, None] - self.window)
        return visible & self.valid[:, None, :]

    def part(self, row: Int[Array, ""] | int, column: Int[Array, ""] | int, rows: int, columns: int) -> "Sight":
        """Of `rows` rows from `row` on and `columns` columns from `column` on."""
        return self.rows(row, rows).columns(column, columns)

    def rows(self, start: Int[Array, ""] | int, count: int) -> "Sight":
        """Of `count` rows from `start` on."""
        return self._cut(("row", "row_place", "row_run"), start, count)

    def columns(self, start: Int[Array, ""] | int, count: int) -> "Sight":
        """Of `count` columns from `start` on."""
        return self._cut(("column", "valid", "place", "run"), start, count)

    def _cut(self, names: tuple[str, ...], start: Int[Array, ""] | int, count: int) -> "Sight":
        arrays = {name: getattr(self, name) for name in names}
        cut = {
            name: jax.lax.dynamic_slice_in_dim(array, start, count, axis=array.ndim - 1)
            for name, array in arrays.items()
            if array is not None
        }
        return dataclasses.replace(self, **cut)

    def padded(self, rows: int, columns: int) -> "Sight":
        """With rows and columns more that nobody is and nobody sees."""
        if not rows and not columns:
            return self
        fill = dict(row=-1, row_place=0, row_run=0, column=0, valid=False, place=0, run=0)

        def longer(name: str) -> Array | None:
            array, more = getattr(self, name), rows if name.startswith("row") else columns
            if array is None:
                return None
            return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, more)], constant_values=fill[name])

        return dataclasses.replace(self, **{name: longer(name) for name in fill})

    def spans(self, block: int) -> tuple[Int[Array, "N"], Int[Array, "N"]]:
        """For each block of rows its first block of columns that any row may see, and the one after its last."""
        end = self.row + 1 if self.causal else jnp.full_like(self.row, self.column.shape[0])
        begin = jnp.zeros_like(end)
        if self.run is not None:  # the end of its run, where that is further on
            behind = jnp.take(_run_ends(self.run), jnp.maximum(self.row, 0), axis=1)
            end = jnp.maximum(end, jnp.where(self.row_run > 0, behind, 0).max(axis=0))
        if self.window is not None:
            first = jax.vmap(lambda place, own: jnp.searchsorted(place, own, side="right"))
            begin = jnp.minimum(first(self.place, self.row_place - self.window).min(axis=0).astype(end.dtype), end)
        blocks = end.shape[0] // block
        begin, end = begin.reshape(blocks, block).min(axis=1), end.reshape(blocks, block).max(axis=1)
        return begin // block, (end + block - 1) // block


def _run_ends(run: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """The column behind the last one of each column's run."""
    columns = jnp.arange(1, run.shape[1] + 1, dtype=jnp.int32)
    last = run != jnp.pad(run, ((0, 0), (0, 1)))[:, 1:]
    return jax.lax.cummin(jnp.where(last, columns, run.shape[1]), axis=1, reverse=True)
