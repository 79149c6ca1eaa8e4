"""The part of the page of `lvlm pocket-training` about CAPL: its arms compared with the base and with each other."""

from collections.abc import Iterator, Mapping, Sequence

from lvlm_jax.evaluation import BENCHMARKS, Scores, get, rescore
from lvlm_jax.pocket import benchmark as pocket
from lvlm_jax.pocket.experiment import ARMS, BASE, PROTOCOL
from lvlm_jax.pocket.training_report import compared

COLUMNS = {
    "accuracy": "accuracy",
    "blind constant": "blind constant",
    "right is likeliest": "right is likeliest",
    "margin, 10⁻³ nat": "margin",
}
# Comparisons in words, by accuracy and by margin; under CAPL's attention unless the name says otherwise.
PAIRS = (
    *((name, BASE) for name in ARMS),
    ("CAPL", "SFT"),
    ("CAPL", "DPO"),
    ("CAPL", "CAPL's pairs"),
    ("CAPL", "CAPL's attention"),
    ("DPO, plain attention", BASE),
    ("CAPL", "DPO, plain attention"),
)
NOTES = """\
All arms start from the same base and learn from the same prompts, for the same number of steps, with the same λ. A row
of several seeds pools the answers of all seeds to every question; the list below the table gives each seed alone.
Intervals resample the groups of images that a question is about. "Blind constant": the accuracy of always giving the
most frequent answer of each kind. "Margin": log p(right answer) − log p(likeliest wrong option), the mean over all
questions. Rows use CAPL's attention unless their name says otherwise."""


def differences(first: Scores, second: Scores, resamples: int) -> Mapping[str, Mapping]:
    """First minus second of every figure, with paired intervals, as JSON values."""
    return rescore.compare(first, second, resamples)["differences"]


def section(by_row: Mapping[str, Scores], single: Mapping[str, Sequence[float]], resamples: int) -> str:
    """The part of the page.

    Args:
        by_row: name of a row -> its scores, the base first.
        single: name of a row -> the accuracy of each seed alone.
    """
    base = by_row[BASE]
    reports = {name: rescore.report(scores, resamples) for name, scores in by_row.items()}
    for name, scores in by_row.items():
        if name != BASE:
            reports[name]["against"] = {"differences": differences(scores, base, resamples)}
    kinds = [figure for figure in base.figures if figure.endswith(": accuracy")]
    columns = {figure.removesuffix(": accuracy").replace("_", " "): figure for figure in kinds}
    count = int(base.sizes()["accuracy"])
    lines = ["## CAPL: pairs, attention, and both", "", NOTES, "", *words(by_row, reports, resamples), ""]
    lines += [f"{count} balanced questions (`{PROTOCOL}`), {len(base.units)} groups of images.", ""]
    lines += [*pocket.table(COLUMNS, reports, "model"), "", *spread(single), ""]
    return "\n".join([*lines, "Accuracy by kind:", "", *pocket.table(columns, reports, "model"), ""])


def words(by_row: Mapping[str, Scores], reports: Mapping[str, Mapping], resamples: int) -> Iterator[str]:
    """Yields the comparisons as sentences, which follow from the intervals by rules.

    The first compares the base under CAPL's attention with the base under truncated attention.
    """
    benchmark = BENCHMARKS[get(PROTOCOL).benchmark]
    for one, other in ((BASE, f"{BASE}, truncated"), *PAIRS):
        if one not in by_row or other not in by_row:
            continue
        against = differences(by_row[one], by_row[other], resamples)
        for figure in ("accuracy", "margin"):
            direction = benchmark.direction(figure)
            yield f"- {compared(one, other, figure, reports, against[figure], direction)[1]}"


def spread(single: Mapping[str, Sequence[float]]) -> Iterator[str]:
    """Yields a line with the accuracy of each seed, for each row that has several seeds."""
    for name, values in single.items():
        if len(values) > 1:
            yield f"- {name}, seed by seed: {', '.join(f'{100 * value:.1f}' for value in values)}"
