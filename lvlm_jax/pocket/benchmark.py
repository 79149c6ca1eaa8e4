"""The pocket benchmark: every kind of benchmark in the pocket world, small enough for a laptop's processor.

The test split is written in the formats of the real benchmarks, so the same code scores both: POPE's three splits,
descriptions with CHAIR, existence, counting, position and colour in MME's layout, and questions about two to four
images on existence, count and identity.
"""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path

from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import BENCHMARKS, Benchmark, Data, get
from lvlm_jax.pocket import splits


@dataclasses.dataclass(frozen=True)
class Part:
    """One benchmark of the pocket world.

    Attributes:
        protocol: name of the protocol.
        title: heading of its tables.
        columns: heading of a column -> name of the figure in it.
        question_file: path of the questions below the world's folder, if the benchmark cannot find them.
        folder: name of the folder of its answers, if it differs from the benchmark's name.
    """

    protocol: str
    title: str
    columns: Mapping[str, str]
    question_file: str | None = None
    folder: str | None = None

    @property
    def benchmark(self) -> Benchmark:
        """The benchmark to which the protocol belongs."""
        return BENCHMARKS[get(self.protocol).benchmark]

    @property
    def name(self) -> str:
        """The name of the part and of its folder."""
        return self.folder or self.benchmark.name

    def data(self, world: Path) -> Data:
        """The folder of the pocket world, and the question file in it, as the benchmark expects them."""
        return Data(world, question_file=self.question_file and world / self.question_file)


POPE = Part(
    "pope/pocket",
    "Is it there? (POPE: accuracy by split, F1 and share of yes over all)",
    {
        "random": "random: accuracy",
        "popular": "popular: accuracy",
        "adversarial": "adversarial: accuracy",
        "F1": "mean: F1",
        "yes": "mean: yes ratio",
    },
)
CHAIR = Part(
    "chair/pocket",
    "Descriptions (CHAIR)",
    {"C_S": "C_S", "C_I": "C_I", "recall": "recall", "F1": "F1", "words": "words"},
)
MME = Part(
    "mme/hallucination",
    "Existence, count, position, colour (MME: 200 points each)",
    {
        "sum": "hallucination",
        "existence": "existence: score",
        "count": "count: score",
        "position": "position: score",
        "colour": "color: score",
    },
)
MULTI_IMAGE = Part(
    "mihbench/pocket",
    "Two to four images (accuracy)",
    {
        "all": "accuracy",
        "in all of them": "in_all_images: accuracy",
        "in one": "in_one_image: accuracy",
        "which one": "which_image: accuracy",
        "how many": "how_many_images: accuracy",
        "the same object": "same_object: accuracy",
    },
    "questions/multi_image.jsonl",
    "multi_image",
)
PARTS = (POPE, CHAIR, MME, MULTI_IMAGE)


def write_world(folder: Path, images: int, seeds: int = 1) -> None:
    """Writes the first `images` scenes of the test split, if the folder does not exist; it appears complete or not at
    all.

    Args:
        seeds: number of seeds; successive scenes use the seeds in turn.

    Raises:
        LVLMError: too few images for POPE, or the folder cannot be written.
    """
    if folder.exists():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as part:
            splits.write_split(Path(part) / "world", "test", images, tuple(range(seeds)))
            (Path(part) / "world").rename(folder)
    except OSError as error:
        raise LVLMError(
            f"the pocket world cannot be written to {str(folder)!r}: {error.strerror}; give another folder"
        ) from error


def markdown(part: Part, scores_of: Mapping[str, Mapping]) -> str:
    """Two tables of a part: the figures of all methods, and the comparison with their controls.

    Args:
        scores_of: method -> content of its `scores.json`; "greedy" first, without controls.
    """
    sizes = (
        f"{one['record']['questions']} questions, {one['record']['images']['count']} images"
        for one in scores_of.values()
    )
    lines = [f"## {part.title}", "", "; or ".join(dict.fromkeys(sizes)), "", *table(part.columns, scores_of)]
    beside = {name: scores["controls"] for name, scores in scores_of.items() if "controls" in scores}
    if beside:
        kinds = list(dict.fromkeys(kind for controls in beside.values() for kind in controls))
        lines += ["", row(["method against", *kinds]), "|---" * (len(kinds) + 1) + "|"]
        for name, controls in beside.items():
            lines.append(row([name, *(_judged(controls.get(kind)) for kind in kinds)]))
    return "\n".join(lines) + "\n"


def table(columns: Mapping[str, str], scores_of: Mapping[str, Mapping], what: str = "method") -> list[str]:
    """Lines of a table: figures with intervals, and below them the difference to the reference run.

    Args:
        columns: heading of a column -> name of the figure in it.
        scores_of: run -> content of its `scores.json`. The reference is the run under the key `against` if there
            is one, else the greedy control. If the scores have a cost, the last column is the time of answering in
            seconds.
        what: heading of the first column.
    """
    timed = ["seconds"] * any("cost" in scores for scores in scores_of.values())
    heading = [what, *columns, *timed]
    lines = [row(heading), "|---" * len(heading) + "|"]
    for name, scores in scores_of.items():
        control = scores.get("controls", {}).get("greedy", {})
        against = scores.get("against", control.get("against", {})).get("differences", {})
        cells = [cell(scores["figures"].get(figure), against.get(figure)) for figure in columns.values()]
        lines.append(row([name, *cells, *(f"{scores['cost']['seconds']:.0f}" for _ in timed)]))
    return lines


def row(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def cell(figure: Mapping | None, difference: Mapping | None = None) -> str:
    """The text of a table's cell: a figure with its interval and, below it, its difference to the reference run.

    Args:
        figure: `{value, unit, interval}`.
        difference: `{value, interval}`, with the paired interval.
    """
    if figure is None or figure["value"] is None:
        return "–"
    unit = figure["unit"]
    text = f"{number(figure['value'], unit)} ({between(figure['interval'], unit)})"
    if difference is not None and difference["value"] is not None:
        change = number(difference["value"], unit, "+"), between(difference["interval"], unit, "+")
        text += f"<br>{change[0]} ({change[1]})"
    return text


def _judged(control: Mapping | None) -> str:
    if control is None:
        return "–"
    differences, figures = control["against"]["differences"], control["figures"]
    return "<br>".join(
        f"{verdict} ({number(differences[name]['value'], figures[name]['unit'], '+')} {name})"
        for name, verdict in control["verdicts"].items()
    ) or "not defined"  # fmt: skip


def number(value: float | None, unit: str, sign: str = "") -> str:
    """A value as text with one decimal: a share in per cent, "–" for no value; `sign` "+" also writes plus signs."""
    return "–" if value is None or value != value else f"{value * (100 if unit == 'share' else 1):{sign}.1f}"


def between(interval: list, unit: str, sign: str = "") -> str:
    """The two ends of an interval as text; `unit` and `sign` as in `number`."""
    return " to ".join(number(bound, unit, sign) for bound in interval)
