"""Tests papers' claims about their methods on a model of the pocket world: one page of the pocket benchmark.

A claim says that a figure is better with a method than without. It is "shown" if the paired 95 % interval of the
difference to greedy decoding is on the better side of 0, "opposite" if it is on the other side, else "not shown".
Beside it are the same difference for the images of each seed, the comparison with sampling that many papers make, and
a trivial control with the same side effect: the same number of words, or the same share of yes.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lvlm_jax.evaluation import verdicts
from lvlm_jax.evaluation.report import comparisons, runs
from lvlm_jax.pocket import benchmark, splits

SHOWN, OPPOSITE, NOT_SHOWN = "shown", "opposite", "not shown"
SAYS = {verdicts.BETTER: SHOWN, verdicts.WORSE: OPPOSITE, verdicts.NONE_SHOWN: NOT_SHOWN}


@dataclasses.dataclass(frozen=True)
class Measure:
    """A figure that claims are about: its part of the benchmark, its name there, and its trivial control."""

    part: benchmark.Part
    figure: str
    control: str


FIGURES = {
    "POPE accuracy": Measure(benchmark.POPE, "mean: accuracy", "threshold"),
    "POPE F1": Measure(benchmark.POPE, "mean: F1", "threshold"),
    "C_S": Measure(benchmark.CHAIR, "C_S", "length"),
    "C_I": Measure(benchmark.CHAIR, "C_I", "length"),
    "caption F1": Measure(benchmark.CHAIR, "F1", "length"),
    "several images": Measure(benchmark.MULTI_IMAGE, "accuracy", "threshold"),
}

NOTES = """\
Figures are shares in per cent and differences in points, each with its 95 % interval (images resampled, paired).
"Shown": the whole interval of the difference to greedy decoding lies on the side that the paper claims; "opposite": it
lies on the other side. By chance alone, an interval misses 0 on a given side in 2.5 of 100 cases. "Worlds": the
differences on the images of each seed. "Sampling": the method with greedy decoding against no method with sampling at
temperature 1. Many papers make this comparison, and greedy decoding alone explains much of such a difference.
"Trivial": against greedy captions cut to the method's length, or, for yes/no questions, against a threshold that gives
as many "yes"."""


def of(name: str, claims: Mapping[str, Sequence[str]]) -> Sequence[str]:
    """The claims about a row of the table: those under its name, or under the part of its name before the first "-"."""
    return claims.get(name, claims.get(name.split("-")[0], ()))


def verdict(interval: Sequence[float | None], direction: int, questions: int) -> str:
    """The verdict on the claim that a method is better than greedy decoding, from the interval of the difference.

    Args:
        direction: 1 if high values are good, -1 if low values are good.
        questions: number of questions that the figure is about.
    """
    name = verdicts.verdict(interval, direction, questions)
    return "not shown (the same)" if list(interval) == [0, 0] else SAYS.get(name, name)


def by_world(measure: Measure, method: Path, greedy: Path, worlds: int) -> list[float]:
    """Differences of the method to greedy, for the images of each seed alone.

    Args:
        method, greedy: folders of the runs.
        worlds: number of seeds, as in `splits.write_split`.
    """
    values = []
    for folder in (method, greedy):
        scores = comparisons.restored(runs.load(folder / "scores.json", folder.name))
        world = np.array([splits.number(unit.split("+")[0]) % worlds for unit in scores.units])
        weights = (world == np.arange(worlds)[:, None]).astype(float)
        values.append(scores.values(weights)[measure.figure])
    return [float(difference) for difference in values[0] - values[1]]


def page(
    scores_of: Mapping[str, Mapping[str, Mapping]], claims: Mapping[str, Sequence[str]], out: Path, worlds: int
) -> str:
    """The page: a table of all claims, how many are shown, and how often captions are fixed and broken.

    Args:
        scores_of: part -> method -> content of its `scores.json`, with "greedy" among the methods.
        claims: method -> keys of `FIGURES`.
        out: folder of the benchmark.
    """
    rows, counts = [], Counter()
    for name in dict.fromkeys(name for scores in scores_of.values() for name in scores):
        for word in of(name, claims):
            measure = FIGURES[word]
            scores = scores_of.get(measure.part.name, {}).get(name)
            if scores is None:
                continue
            verdict_of_claim, cells = _row(measure, scores, out / measure.part.name / name, worlds)
            counts[NOT_SHOWN if verdict_of_claim.startswith(NOT_SHOWN) else verdict_of_claim] += 1
            rows.append(benchmark.row([name, word, *cells]))
    heading = ["method", "better by", "greedy", "with it", "difference", "claim", "worlds", "sampling", "trivial"]
    counted = ", ".join(f"{counts[word]} {word}" for word in dict.fromkeys((SHOWN, NOT_SHOWN, OPPOSITE, *counts)))
    lines = ["## Are the papers' claims shown here?", "", f"{len(rows)} claims: {counted}.", "", NOTES, ""]
    lines += [benchmark.row(heading), "|---" * len(heading) + "|", *rows]
    return "\n".join([*lines, "", *_captions(scores_of.get(benchmark.CHAIR.name, {}))]) + "\n"


def _row(measure: Measure, scores: Mapping, folder: Path, worlds: int) -> tuple[str, list[str]]:
    """The verdict on a claim, and the cells of its row."""
    greedy = scores["controls"]["greedy"]
    difference = greedy["against"]["differences"][measure.figure]
    direction = measure.part.benchmark.direction(measure.figure)
    verdict_of_claim = verdict(difference["interval"], direction, scores["record"]["questions"])
    unit = scores["figures"][measure.figure]["unit"]
    each = [benchmark.number(one, unit, "+") for one in by_world(measure, folder, folder.parent / "greedy", worlds)]
    cells = [
        benchmark.cell(greedy["figures"][measure.figure]),
        benchmark.cell(scores["figures"][measure.figure]),
        f"{benchmark.number(difference['value'], unit, '+')} ({benchmark.between(difference['interval'], unit, '+')})",
        f"**{verdict_of_claim}**" if verdict_of_claim in (SHOWN, OPPOSITE) else verdict_of_claim,
        ", ".join(each),
        _beside(measure, scores["controls"], "temperature", unit),
        _beside(measure, scores["controls"], measure.control, unit),
    ]
    return verdict_of_claim, cells


def _beside(measure: Measure, controls: Mapping, kind: str, unit: str) -> str:
    """Whether the method is better than a control, with the difference; "–" if the control lacks the figure."""
    difference = controls.get(kind, {}).get("against", {}).get("differences", {}).get(measure.figure)
    if difference is None or difference["value"] is None:
        return "–"
    direction = measure.part.benchmark.direction(measure.figure)
    verdict_of_control = verdicts.verdict(difference["interval"], direction, controls[kind]["questions"])
    return f"{verdict_of_control.removeprefix('significantly ')} ({benchmark.number(difference['value'], unit, '+')})"


def _captions(scores_of: Mapping[str, Mapping]) -> list[str]:
    """How often a method fixes a caption, and how often it breaks one, with the first images of each."""
    if len(scores_of) < 2:
        return []
    free = {name: {number: right for _, number, right in scores["correct"]} for name, scores in scores_of.items()}
    greedy = free["greedy"]
    heading = ["method", "fixed", "broken", "fixed images", "broken images"]
    lines = [
        "## Captions fixed and broken",
        "",
        f"{len(greedy)} images. Fixed: greedy decoding names an absent object and the method does not; broken: the "
        "other way round. The last two columns give the numbers of the first such images.",
        "",
        benchmark.row(heading),
        "|---" * len(heading) + "|",
    ]
    for name, right in free.items():
        if name != "greedy":
            mended = [number for number, good in right.items() if good and not greedy[number]]
            spoilt = [number for number, good in right.items() if greedy[number] and not good]
            counts = [str(len(mended)), str(len(spoilt))]
            first = [", ".join(str(splits.number(number)) for number in some[:3]) or "–" for some in (mended, spoilt)]
            lines.append(benchmark.row([name, *counts, *first]))
    return lines
