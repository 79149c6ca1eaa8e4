"""Scores as sums of counts over images, so that every figure can be recomputed from resampled images."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Totals = Mapping[str, np.ndarray]  # count -> sums over images, of any shape (one sum, or one per resample)


@dataclasses.dataclass(frozen=True)
class Figure:
    """One named number of a benchmark, as a function of summed counts.

    Attributes:
        compute: from totals to values of the totals' shape; nan if undefined (division by zero).
        over: the counts whose sum is the number of things that the figure is about ("n" in tables).
        unit: "share" (0 to 1, shown in per cent) or the word for what is counted ("points", "words").
    """

    compute: Callable[[Totals], np.ndarray]
    over: tuple[str, ...]
    unit: str = "share"


def divide(numerator, denominator) -> np.ndarray:
    """numerator / denominator; nan if the denominator is 0."""
    numerator, denominator = np.asarray(numerator, float), np.asarray(denominator, float)
    out = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    return np.divide(numerator, denominator, out=out, where=denominator != 0)


def ratio(numerator: Sequence[str], denominator: Sequence[str], unit: str = "share") -> Figure:
    """The sum of some counts divided by the sum of others."""

    def compute(totals: Totals) -> np.ndarray:
        return divide(sum(totals[name] for name in numerator), sum(totals[name] for name in denominator))

    return Figure(compute, tuple(denominator), unit)


def combined(figures: Sequence[Figure], combine: Callable[[np.ndarray], np.ndarray], unit: str) -> Figure:
    """A figure made from other figures: `combine` maps their values [F, ...] to [...]."""

    def compute(totals: Totals) -> np.ndarray:
        return combine(np.stack([figure.compute(totals) for figure in figures]))

    return Figure(compute, tuple(name for figure in figures for name in figure.over), unit)


def mean(figures: Sequence[Figure]) -> Figure:
    """The plain mean of figures, such as POPE's splits."""
    return combined(figures, lambda values: values.mean(axis=0), figures[0].unit)


def total(figures: Sequence[Figure]) -> Figure:
    """The sum of figures, such as MME's subtasks."""
    return combined(figures, lambda values: values.sum(axis=0), figures[0].unit)


@dataclasses.dataclass(frozen=True)
class Scores:
    """The results of a benchmark.

    Attributes:
        units: names of the images (or of sets of images in one question), [U].
        counts: names of the counts, [C].
        table: the counts of each image, [U, C].
        figures: name -> figure, in the order of a report.
        correct: (group, id) -> whether the answer was right, if answers are right or wrong.
        notes: remarks for readers of the figures ("unparsed": 3, "matching": "exact", ...).
    """

    units: tuple[str, ...]
    counts: tuple[str, ...]
    table: np.ndarray
    figures: Mapping[str, Figure]
    correct: Mapping[tuple[str, str], bool]
    notes: Mapping[str, object]

    def totals(self, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Sums over images, [...]. `weights` [..., U] says how often each image counts; None counts each once."""
        sums = self.table.sum(axis=0) if weights is None else weights @ self.table
        return {name: sums[..., i] for i, name in enumerate(self.counts)}

    def values(self, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The value of every figure, [...]; `weights` as in `totals`."""
        totals = self.totals(weights)
        return {name: figure.compute(totals) for name, figure in self.figures.items()}

    def sizes(self) -> dict[str, int]:
        """The number of questions or objects behind each figure."""
        totals = self.totals()
        return {
            name: int(sum(totals[count] for count in dict.fromkeys(figure.over)))
            for name, figure in self.figures.items()
        }


class Tally:
    """Counts per image, filled question by question."""

    def __init__(self):
        self._counts: dict[str, defaultdict[str, float]] = {}
        self.correct: dict[tuple[str, str], bool] = {}

    def add(self, unit: str, **counts: float) -> None:
        """Adds to the counts of one image: `add(unit, **{"random/tp": 1})`."""
        row = self._counts.setdefault(unit, defaultdict(float))
        for name, count in counts.items():
            row[name] += count

    def scores(self, counts: Sequence[str], figures: Mapping[str, Figure], notes: Mapping) -> Scores:
        """The scores, with images in the order of their first question; a count that never occurred is 0."""
        table = np.array([[row[name] for name in counts] for row in self._counts.values()], float)
        return Scores(
            tuple(self._counts),
            tuple(counts),
            table.reshape(len(self._counts), len(counts)),
            figures,
            self.correct,
            notes,
        )
