"""Which columns each row sees, stored in O(T + S) memory: any block of the T x S mask can be made from it."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# The arrays of a mask, with their values for a filler row or column.
_FILLER = dict(
    row=-1, row_place=0, row_run=0, row_answer=0, row_picture=0, row_group=0,
    column=0, valid=False, place=0, run=0, answer=0, picture=0, group=0,
)  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LazyMask:
    """The mask of T rows over S columns, made block by block: a row sees itself and earlier tokens.

    Attributes:
        row, column: column indices of the rows, and of the columns; -1 for a filler row.
        valid: columns that contain a token.
        place, row_place: number of tokens up to each column, and up to each row's column; None without a sliding
            window. These count tokens, not columns, because columns between a prompt and its answer may be unused.
        run, row_run: number (from 1) of the uninterrupted run of image tokens that a column or row belongs to, 0 for
            text; None if image tokens do not see later tokens of their run.
        answer, row_answer: number (from 1) of the answer that a column or row belongs to, 0 for the prompt, which all
            answers see; None if there is one answer at most.
        picture, row_picture: number (from 1) of the image that a column belongs to, 0 for text; of images, a row sees
            only columns of its own number, or all if that is 0. None if rows see all images.
        group, row_group: rows and columns of different groups above 0 see each other whatever else hides them; None
            without groups.
        window: how many tokens back a row sees, itself included.
        causal: False lets every row see all valid columns.
    """

    row: Int[Array, "T"]
    column: Int[Array, "S"]
    valid: Bool[Array, "B S"]
    place: Int[Array, "B S"] | None = None
    row_place: Int[Array, "B T"] | None = None
    run: Int[Array, "B S"] | None = None
    row_run: Int[Array, "B T"] | None = None
    answer: Int[Array, "B S"] | None = None
    row_answer: Int[Array, "B T"] | None = None
    picture: Int[Array, "B S"] | None = None
    row_picture: Int[Array, "B T"] | None = None
    group: Int[Array, "B S"] | None = None
    row_group: Int[Array, "B T"] | None = None
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    causal: bool = dataclasses.field(default=True, metadata={"static": True})

    @classmethod
    def of(
        cls,
        row: Int[Array, "T"],
        valid: Bool[Array, "B S"],
        window: int | None,
        image: Bool[Array, "B S"] | None,
        answer: Int[Array, "B S"] | None = None,
    ) -> "LazyMask":
        """The mask for rows at these columns; `image` marks image tokens if they see later ones of their run."""
        place = run = None
        if window is not None:
            place = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
        if image is not None:
            begins = image & ~jnp.pad(image, ((0, 0), (1, 0)))[:, :-1]
            run = jnp.where(image, jnp.cumsum(begins, axis=1, dtype=jnp.int32), 0)
        counted = {"place": place, "run": run, "answer": answer}
        counted = {name: array for name, array in counted.items() if array is not None}
        of_rows = {f"row_{name}": jnp.take(array, row, axis=1) for name, array in counted.items()}
        column = jnp.arange(valid.shape[1], dtype=jnp.int32)
        return cls(row.astype(jnp.int32), column, valid, window=window, **counted, **of_rows)

    @classmethod
    def everywhere(cls, rows: int, valid: Bool[Array, "B S"]) -> "LazyMask":
        """A mask in which rows see every valid column: the patches of an image, with filler after them."""
        own, column = (jnp.arange(count, dtype=jnp.int32) for count in (rows, valid.shape[1]))
        return cls(own, column, valid, causal=False)

    def of_pictures(self, picture: Int[Array, "B S"], row_picture: Int[Array, "B T"]) -> "LazyMask":
        """The same mask, in which rows see the columns of one image, or of all; see `picture`."""
        return dataclasses.replace(self, picture=picture, row_picture=row_picture)

    def crossing(self, group: Int[Array, "B S"]) -> "LazyMask":
        """The same mask, in which also the tokens of different groups above 0 see each other."""
        return dataclasses.replace(self, group=group, row_group=jnp.take(group, self.row, axis=1))

    def mask(self) -> Bool[Array, "B T S"]:
        """The dense mask."""
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
        if self.answer is not None:
            own = self.answer[:, None, :]
            visible = visible & ((own == 0) | (own == self.row_answer[:, :, None]))
        if self.picture is not None:
            own, of_row = self.picture[:, None, :], self.row_picture[:, :, None]
            visible = visible & ((own == 0) | (of_row == 0) | (own == of_row))
        visible = visible & self.valid[:, None, :]
        if self.group is not None:
            own, other = self.row_group[:, :, None], self.group[:, None, :]
            visible = visible | ((own > 0) & (other > 0) & (own != other))
        return visible

    def part(self, row: Int[Array, ""] | int, column: Int[Array, ""] | int, rows: int, columns: int) -> "LazyMask":
        """The block of `rows` rows from `row` on and `columns` columns from `column` on."""
        return self.rows(row, rows).columns(column, columns)

    def rows(self, start: Int[Array, ""] | int, count: int) -> "LazyMask":
        """The mask of `count` rows from `start` on."""
        return self._cut(tuple(name for name in _FILLER if name.startswith("row")), start, count)

    def columns(self, start: Int[Array, ""] | int, count: int) -> "LazyMask":
        """The mask of `count` columns from `start` on."""
        return self._cut(tuple(name for name in _FILLER if not name.startswith("row")), start, count)

    def _cut(self, names: tuple[str, ...], start: Int[Array, ""] | int, count: int) -> "LazyMask":
        arrays = {name: getattr(self, name) for name in names}
        cut = {
            name: jax.lax.dynamic_slice_in_dim(array, start, count, axis=array.ndim - 1)
            for name, array in arrays.items()
            if array is not None
        }
        return dataclasses.replace(self, **cut)

    def padded(self, rows: int, columns: int) -> "LazyMask":
        """Appends filler rows and filler columns that see nothing and that nothing sees."""
        if not rows and not columns:
            return self

        def pad(name: str) -> Array | None:
            array, count = getattr(self, name), rows if name.startswith("row") else columns
            if array is None:
                return None
            return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, count)], constant_values=_FILLER[name])

        return dataclasses.replace(self, **{name: pad(name) for name in _FILLER})

    def spans(self, block: int) -> tuple[Int[Array, "N"], Int[Array, "N"]]:
        """For each block of rows, the first block of columns that any row sees, and the block after the last."""
        begin, end = self._bounds()
        if self.group is not None:
            there = self.group > 0
            first = jnp.where(there.any(axis=1), jnp.argmax(there, axis=1), self.column.shape[0])
            last = jnp.where(there, jnp.arange(1, there.shape[1] + 1), 0).max(axis=1)
            begin = jnp.where(self.row_group > 0, jnp.minimum(begin, first[:, None]), begin)
            end = jnp.where(self.row_group > 0, jnp.maximum(end, last[:, None]), end)
        begin, end = (bound.reshape(bound.shape[0], -1, block) for bound in (begin, end))
        return begin.min(axis=(0, 2)) // block, (end.max(axis=(0, 2)) + block - 1) // block

    def in_integers(self) -> tuple[Int[Array, "B _"], ...]:
        """The mask as `native/attention.h` reads it: B samples, seven arrays of T or S integers.

        Returns:
            begin, end, row_label, row_picture, row_group: of each row.
            label, group: of each column.
        """
        rows = (self.valid.shape[0], self.row.shape[0])
        nothing, none = jnp.zeros(rows, jnp.int32), jnp.zeros(self.valid.shape, jnp.int32)
        begin, end = (jnp.broadcast_to(bound, rows) for bound in self._bounds())
        label = none if self.answer is None else self.answer
        label = label if self.picture is None else jnp.where(self.picture > 0, -1 - self.picture, label)
        of_rows = (nothing if array is None else array for array in (self.row_answer, self.row_picture, self.row_group))
        of_columns = jnp.where(self.valid, label, -1), none if self.group is None else self.group
        return tuple(array.astype(jnp.int32) for array in (begin, end, *of_rows, *of_columns))

    def _bounds(self) -> tuple[Int[Array, "#B T"], Int[Array, "#B T"]]:
        """The first column that each row may see, and the one after the last."""
        end = (self.row + 1 if self.causal else jnp.full_like(self.row, self.column.shape[0]))[None]
        begin = jnp.zeros_like(end)
        if self.run is not None:  # or the end of the row's run, if that is later
            run_end = jnp.take(_run_ends(self.run), jnp.maximum(self.row, 0), axis=1)
            end = jnp.maximum(end, jnp.where(self.row_run > 0, run_end, 0))
        if self.window is not None:
            first = jax.vmap(lambda place, own: jnp.searchsorted(place, own, side="right"))
            begin = jnp.minimum(first(self.place, self.row_place - self.window).astype(end.dtype), end)
        return begin, end

    def average_span(self, block: int) -> float:
        """The average number of blocks of columns that a block of rows sees, computed from the shapes alone.

        If there are fewer rows than columns, they are assumed to be the last ones, or the first ones if image tokens
        see later ones.
        """
        rows, columns = self.row.shape[0], self.column.shape[0]
        behind = 0 if self.run is not None or columns < rows else columns - rows
        spans = []
        for start in range(behind, behind + rows, block):
            end = min(start + block, columns) if self.causal and self.group is None else columns
            begin = 0 if self.window is None else max(0, start + 1 - self.window)
            spans.append(-(-end // block) - begin // block)
        return sum(spans) / len(spans)


def _run_ends(run: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """The index after the last column of each column's run."""
    columns = jnp.arange(1, run.shape[1] + 1, dtype=jnp.int32)
    last = run != jnp.pad(run, ((0, 0), (0, 1)))[:, 1:]
    return jax.lax.cummin(jnp.where(last, columns, run.shape[1]), axis=1, reverse=True)
