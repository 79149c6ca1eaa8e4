"""What stands in a cell of a report, and the words for a difference.

`evaluation.verdicts` says what a difference is called.
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
    """What stands in a cell, as text; `order` is what the column is sorted by (None comes last)."""

    text: str = ""
    interval: str = ""
    difference: str = ""
    verdict: str = ""
    mark: str = ""
    order: float | None = None


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


def cell(
    value: Value, direction: int, difference: Difference | None = None, mark: str = "", questions: int = 0
) -> Cell:
    """The cell of a figure, and of a difference to it; `direction` and `questions` as in `verdict`."""
    order = value.value if math.isfinite(value.value) else None
    found = Cell(shown(value.value, value.unit), between(value.interval, value.unit), mark=mark, order=order)
    if difference is None:
        return found
    says = verdict(difference.interval, direction, questions)
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


def judged(
    benchmark: Benchmark, differences: Mapping[str, Difference], names: Sequence[str], questions: Callable[[str], int]
) -> str:
    """What a method does against a control, by those of the figures that can be good or bad.

    Answers that are not understood are wrong already, so their number is not judged again.

    Args:
        questions: from the name of a figure to how many questions it is about.
    """
    by_verdict: dict[str, list[str]] = {}
    for name in names:
        direction = benchmark.direction(name)
        if direction and name in differences and not name.endswith("unparsed"):
            says = verdict(differences[name].interval, direction, questions(name))
            by_verdict.setdefault(says, []).append(word_of(name))
    parts = (
        f"{says} in {', '.join(words)}"
        for says, words in sorted(by_verdict.items(), key=lambda one: ORDER.index(one[0]))
    )
    return "; ".join(parts) or "not compared"
