"""Verdicts: what the difference between two runs shows, in words.

A run is significantly better than another by a figure if the paired 95 % interval of their difference lies on the
better side of 0, and significantly worse if it lies on the worse side. Otherwise no difference is shown, which is not
the same as no difference. Below 30 questions there is no verdict, because an interval of so few answers says little.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

LEAST = 30  # smallest number of questions
BETTER, WORSE = "significantly better", "significantly worse"
HIGHER, LOWER = "significantly higher", "significantly lower"  # for figures that are neither good nor bad
NONE_SHOWN = "no difference shown"
TOO_FEW = f"no verdict below {LEAST} questions"
NOT_DEFINED = "not defined"


def verdict(interval: Sequence[float | None], direction: int, questions: int) -> str:
    """The verdict on the interval of one figure's difference.

    Args:
        interval: ends of the interval of the difference, first minus second run; None or nan if undefined.
        direction: 1 if a high value of the figure is good, -1 if a low one is, 0 if neither.
        questions: how many questions the figure is about.
    """
    low, high = interval
    if low is None or high is None or low != low:
        return NOT_DEFINED
    if questions < LEAST:
        return TOO_FEW
    if low <= 0 <= high:
        return NONE_SHOWN
    sign = 1 if low > 0 else -1
    return {1: BETTER, -1: WORSE, 0: HIGHER if sign > 0 else LOWER}[sign * direction]


def questions_behind(figure: str, sizes: Mapping[str, int], correct: Collection[tuple[str, str]]) -> int:
    """How many questions a figure is about.

    Args:
        figure: name of the figure, such as "random: F1", "mean: accuracy" or "C_S".
        sizes: n of every figure of the run; an F1 may be about fewer answers than there are questions.
        correct: (group, id) of all questions.
    """
    prefix = figure.rpartition(": ")[0]
    of_group = Counter(group for group, _ in correct)[prefix]
    return of_group or sizes.get(f"{prefix}: accuracy") or len(correct)


def compared(says: str, first: str, second: str, figure: str) -> str:
    """The beginning of a verdict's sentence: "A is significantly better than B on C_S"."""
    if says == NONE_SHOWN:
        return f"No difference shown between {first} and {second} on {figure}"
    if says in (TOO_FEW, NOT_DEFINED):
        return f"{says.capitalize()}: {first} against {second} on {figure}"
    return f"{first[:1].upper()}{first[1:]} is {says} than {second} on {figure}"


def sentence(
    says: str, first: str, second: str, figure: str, values: Sequence[float], difference: Sequence[float], count: str
) -> str:
    """A verdict with its figures.

    Args:
        says: the verdict, from `verdict`.
        first, second: names of the two runs.
        values: values of the figure, first and second, as shown (shares in per cent).
        difference: first minus second and the ends of its interval, as shown.
        count: what the figure is about ("810 questions, 60 images").
    """
    change, low, high = difference
    return (
        f"{compared(says, first, second, figure)}: {values[0]:.1f} against {values[1]:.1f}, difference {change:+.1f} "
        f"(95 % interval {low:+.1f} to {high:+.1f}; {count})."
    )
