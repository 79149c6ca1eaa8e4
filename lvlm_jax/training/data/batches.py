"""Training batches by step number.

A batch depends only on its number: grain shuffles each epoch of a file and continues with the next epoch.

With groups, the samples of several successive batches are drawn together, sorted by length and cut into batches, whose
order is shuffled. So the samples of a batch have similar lengths and little padding, and an epoch has the same samples
as without groups. No group reaches beyond the last step of an epoch.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import grain
import numpy as np

from lvlm_jax.errors import LVLMError
from lvlm_jax.training.data import pictures
from lvlm_jax.training.data.pair_batches import Batch, EncodedRow, Encoder, Shape, assemble, shape_of


@dataclasses.dataclass(frozen=True)
class Batches:
    """Training batches by step number; picklable.

    Attributes:
        rows: the data set; rows of several files are concatenated.
        encoder: turns rows into arrays.
        batch: rows per step.
        accumulate: number of parts of a step's batch, all of one shape.
        seed: seed of the order.
        shares: (number of rows of a file, its share of the batches) for each file; empty: all rows equally often.
        groups: number of batches that are drawn together; 1 leaves rows in the order in which they are drawn.
    """

    rows: tuple[EncodedRow, ...]
    encoder: Encoder
    batch: int
    accumulate: int = 1
    seed: int = 0
    shares: tuple[tuple[int, float], ...] = ()
    groups: int = 1

    def __post_init__(self):
        if self.batch < 1 or self.accumulate < 1 or self.batch % self.accumulate:
            raise LVLMError(
                f"batch is {self.batch} and accumulate {self.accumulate}; expected a batch that is a multiple of "
                "accumulate"
            )

    def __call__(self, step: int) -> Batch:
        """The batch of a step, from 0."""
        order = self.order(step)
        rows = [self.rows[index] for index in order]
        size = self.batch // self.accumulate
        cuts = [slice(start, start + size) for start in range(0, self.batch, size)]
        shapes = [shape_of(rows[cut], self.encoder, size) for cut in cuts]
        shape = Shape(*(max(sizes) for sizes in zip(*map(dataclasses.astuple, shapes), strict=True)))
        parts = [assemble(self.encoder, rows[cut], order[cut], shape) for cut in cuts]
        return parts[0] if self.accumulate == 1 else _stacked(parts)

    def order(self, step: int) -> list[int]:
        """Indices of the rows of a step."""
        first, count = self._group(step)
        rows = [int(self._shuffled[place]) for place in range(first * self.batch, (first + count) * self.batch)]
        if count == 1:
            return rows
        rows.sort(key=lambda index: self.encoder.length(self.rows[index]))
        which = np.random.default_rng([self.seed, first]).permutation(count)[step - first]
        return rows[which * self.batch : (which + 1) * self.batch]

    def _group(self, step: int) -> tuple[int, int]:
        """The first step of a step's group, and the number of steps in the group."""
        if self.groups == 1:
            return step, 1
        epoch = max(1, step * self.batch // len(self.rows) - 1)
        while self.steps(epoch) <= step:
            epoch += 1
        begin = self.steps(epoch - 1) if epoch > 1 else 0
        first = step - (step - begin) % self.groups
        return first, min(self.groups, self.steps(epoch) - first)

    def describe(self, step: int) -> str:
        """The ids of a step's rows, for messages."""
        return ", ".join(self.rows[index].id for index in self.order(step))

    def steps(self, epochs: float) -> int:
        """The number of steps in which every row occurs `epochs` times; at least 1."""
        return max(1, round(epochs * len(self.rows) / self.batch))

    @functools.cached_property
    def _shuffled(self) -> grain.MapDataset:
        starts = itertools.accumulate((count for count, _ in self.shares), initial=0)
        spans = [(start, start + count) for start, (count, _) in zip(starts, self.shares, strict=False)]
        datasets = [
            grain.MapDataset.range(*span).shuffle(seed=self.seed + number).repeat()
            for number, span in enumerate(spans or [(0, len(self.rows))])
        ]
        return grain.MapDataset.mix(datasets, [share for _, share in self.shares]) if len(datasets) > 1 else datasets[0]


def _stacked(parts: Sequence[Batch]) -> Batch:
    first = parts[0]
    return {
        name: _stacked([part[name] for part in parts])
        if isinstance(first[name], dict)
        else pictures.stacked([part[name] for part in parts])
        for name in first
    }
