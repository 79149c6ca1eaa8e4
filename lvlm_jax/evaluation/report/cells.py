"""What stands in a cell of a report, and the words for a difference.

A difference is called better or worse (higher or lower, where neither is good) only if its 95 % interval leaves out 0;
else it is "no difference shown". Where a figure has nothing to divide by, it is "not defined".
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from lvlm_jax.evaluation.benchmark import Benchmark, word_of
from lvlm_jax.evaluation.report.runs import Value
from lvlm_jax.evaluation.statistics import Difference

NONE_SHOWN, NOT_DEFINED = "no difference shown", "not defined"


@dataclasses.dataclass(frozen=True)
class Cell:
    """What stands in a cell, as text; `order` is what the column is sorted by (None comes last)."""

    text: str = ""
    interval: str = ""
    difference: str = ""
    verdict: str = ""
    mark: str = ""
    order: float | None = None


def verdict(direction: int, difference: Difference) -> str:
    """What a difference shows, in words, of a figure whose high values are good (1), or low ones (-1), or neither."""
    low, high = difference.interval
    if math.isnan(difference.value) or math.isnan(low):
        return NOT_DEFINED
    if low <= 0 <= high:
        return NONE_SHOWN
    sign = 1 if low > 0 else -1
    return {1: "better", -1: "worse", 0: "higher" if sign > 0 else "lower"}[sign * direction]


def shown(value: float, unit: str, signed: bool = False) -> str:
    """A number as it stands in tables: shares in per cent, one place."""
    if math.isnan(value):
        return "–"
    text = f"{value * (100 if unit == 'share' else 1):{'+' if signed else ''}.1f}"
    return ("0.0" if float(text) == 0 else text).replace("-", "−")


def between(interval: tuple[float, float], unit: str, signed: bool = False) -> str:
    """An interval in words; nothing where it is not defined."""
    if math.isnan(interval[0]):
        return ""
    return " to ".join(shown(bound, unit, signed) for bound in interval)


def cell(value: Value, direction: int, difference: Difference | None = None, mark: str = "") -> Cell:
    """The cell of a figure, and of a difference to it; `direction` as in `verdict`."""
    order = value.value if math.isfinite(value.value) else None
    found = Cell(shown(value.value, value.unit), between(value.interval, value.unit), mark=mark, order=order)
    if difference is None:
        return found
    says = verdict(direction, difference)
    if says == NOT_DEFINED:
        return dataclasses.replace(found, verdict=says)
    words = f"{shown(difference.value, value.unit, True)} ({between(difference.interval, value.unit, True)})"
    return dataclasses.replace(found, difference=words, verdict=says)


def number(value: float | None, text: str | None = None) -> Cell:
    """A cell of a plain number, "–" where there is none; `text` is what is shown instead."""
    there = value is not None and math.isfinite(value)
    if text is None:
        text = str(value) if there else "–"
    return Cell(text, order=value if there else None)


def beats(benchmark: Benchmark, differences: Mapping[str, Difference], names: Sequence[str]) -> str:
    """Whether a method does more than a control, by those of the figures that can be good or bad.

    Answers that are not understood are wrong already, so their number is not judged again.
    """
    by_verdict: dict[str, list[str]] = {}
    for name in names:
        direction = benchmark.direction(name)
        if direction and name in differences and not name.endswith("unparsed"):
            by_verdict.setdefault(verdict(direction, differences[name]), []).append(word_of(name))
    if not by_verdict:
        return "not compared"
    parts = "; ".join(
        f"{word} in {', '.join(by_verdict[word])}"
        for word in ("better", "worse", NONE_SHOWN, NOT_DEFINED)
        if word in by_verdict
    )
    if "better" in by_verdict:
        return f"{'mixed' if 'worse' in by_verdict else 'beats it'}: {parts}"
    if "worse" in by_verdict:
        return f"does less: {parts}"
    return f"not shown to beat it: {parts}"
