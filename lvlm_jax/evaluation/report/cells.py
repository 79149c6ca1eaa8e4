"""Cells of a report's tables, and the words for differences.

`evaluation.verdicts` has the names of differences.
"""

import dataclasses
import math

from lvlm_jax.evaluation.report.runs import Value
from lvlm_jax.evaluation.statistics import Difference
from lvlm_jax.evaluation.verdicts import BETTER, HIGHER, LEAST, LOWER, NONE_SHOWN, NOT_DEFINED, TOO_FEW, WORSE, verdict

NOT_COMPARED = "not compared"
# Text of a cell instead of a verdict.
MARKS = {BETTER: "▲", WORSE: "▼", HIGHER: "△", LOWER: "▽", NONE_SHOWN: "○", TOO_FEW: f"n<{LEAST}",
         NOT_DEFINED: NOT_DEFINED, NOT_COMPARED: NOT_COMPARED}  # fmt: skip
LEGEND = (
    (BETTER, MARKS[BETTER], "significantly better"),
    (WORSE, MARKS[WORSE], "significantly worse"),
    (HIGHER, f"{MARKS[HIGHER]} {MARKS[LOWER]}", "significantly higher or lower (neither is better)"),
    (NONE_SHOWN, MARKS[NONE_SHOWN], "no difference shown (there may still be one)"),
    (TOO_FEW, MARKS[TOO_FEW], "too few questions for a verdict"),
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """The texts of a cell, and `order`, by which its column is sorted (None comes last)."""

    text: str = ""
    interval: str = ""
    difference: str = ""
    verdict: str = ""
    mark: str = ""
    order: float | None = None


def shown(value: float, unit: str, signed: bool = False) -> str:
    """Formats a number for tables, with one decimal; shares are in per cent."""
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
    plain = Cell(shown(value.value, value.unit), between(value.interval, value.unit), mark=mark, order=order)
    if difference is None:
        return plain
    verdict_words = verdict(difference.interval, direction, questions)
    if verdict_words == NOT_DEFINED:
        return dataclasses.replace(plain, verdict=verdict_words)
    words = f"{shown(difference.value, value.unit, True)} ({between(difference.interval, value.unit, True)})"
    return dataclasses.replace(plain, difference=words, verdict=verdict_words)


def number(value: float | None, text: str | None = None) -> Cell:
    """The cell of a plain number, "–" if there is none; `text` is shown instead of the number."""
    is_number = value is not None and math.isfinite(value)
    if text is None:
        text = str(value) if is_number else "–"
    return Cell(text, order=value if is_number else None)
