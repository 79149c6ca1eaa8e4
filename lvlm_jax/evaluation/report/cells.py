"""Cells of a report's tables, and the words for differences.

`evaluation.verdicts` has the names of differences.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from lvlm_jax.evaluation.benchmark import Benchmark, word_of
from lvlm_jax.evaluation.report.runs import Value
from lvlm_jax.evaluation.statistics import Difference
from lvlm_jax.evaluation.verdicts import BETTER, NONE_SHOWN, NOT_DEFINED, TOO_FEW, WORSE, verdict

ORDER = (BETTER, WORSE, NONE_SHOWN, TOO_FEW, NOT_DEFINED)


@dataclasses.dataclass(frozen=True)
class Cell:
    """The text of a cell; `order` is the sort key of its column (None comes last)."""

    text: str = ""
    interval: str = ""
    difference: str = ""
    verdict: str = ""
    mark: str = ""
    order: float | None = None


def shown(value: float, unit: str, signed: bool = False) -> str:
    """Formats a number for tables: shares in per cent with one decimal."""
    if math.isnan(value):
        return "–"
    text = f"{value * (100 if unit == 'share' else 1):{'+' if signed else ''}.1f}"
    return ("0.0" if float(text) == 0 else text).replace("-", "−")


def between(interval: tuple[float, float], unit: str, signed: bool = False) -> str:
    """An interval in words; empty if it is undefined."""
    if math.isnan(interval[0]):
        return ""
    return " to ".join(shown(bound, unit, signed) for bound in interval)


def cell(
    value: Value, direction: int, difference: Difference | None = None, mark: str = "", questions: int = 0
) -> Cell:
    """The cell of a figure and its difference; `direction` and `questions` as in `verdict`."""
    order = value.value if math.isfinite(value.value) else None
    found = Cell(shown(value.value, value.unit), between(value.interval, value.unit), mark=mark, order=order)
    if difference is None:
        return found
    verdict_words = verdict(difference.interval, direction, questions)
    if verdict_words == NOT_DEFINED:
        return dataclasses.replace(found, verdict=verdict_words)
    words = f"{shown(difference.value, value.unit, True)} ({between(difference.interval, value.unit, True)})"
    return dataclasses.replace(found, difference=words, verdict=verdict_words)


def number(value: float | None, text: str | None = None) -> Cell:
    """The cell of a plain number, "–" if there is none; `text` is shown instead of the number."""
    is_number = value is not None and math.isfinite(value)
    if text is None:
        text = str(value) if is_number else "–"
    return Cell(text, order=value if is_number else None)


def judged(
    benchmark: Benchmark, differences: Mapping[str, Difference], names: Sequence[str], questions: Callable[[str], int]
) -> str:
    """How a method compares with a control, by those figures that can be good or bad.

    Unparsed answers already count as wrong, so their number is not judged again.

    Args:
        questions: maps the name of a figure to its number of questions.
    """
    by_verdict: dict[str, list[str]] = {}
    for name in names:
        direction = benchmark.direction(name)
        if direction and name in differences and not name.endswith("unparsed"):
            verdict_words = verdict(differences[name].interval, direction, questions(name))
            by_verdict.setdefault(verdict_words, []).append(word_of(name))
    parts = (
        f"{verdict_words} in {', '.join(words)}"
        for verdict_words, words in sorted(by_verdict.items(), key=lambda one: ORDER.index(one[0]))
    )
    return "; ".join(parts) or "not compared"
