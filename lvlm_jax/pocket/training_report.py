"""The effects of flow alignment on the pocket benchmark: compared models, tables, and conclusions in words.

POPE and CHAIR measure them. The tables compare the trained model with the initial model, and with the initial model
under SEVI. The page of `lvlm pocket-training` has this part and the part of `experiment_report`.
"""

import collections
import dataclasses
import datetime
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from lvlm_jax.evaluation import verdicts
from lvlm_jax.journal.record import checkpoint_hash, differences
from lvlm_jax.methods import Method
from lvlm_jax.pocket import benchmark as pocket
from lvlm_jax.training import settings
from lvlm_jax.version import __version__

PARTS = (pocket.POPE, pocket.CHAIR)
CLOSE_COLUMNS = {
    "base, 10⁻³ nat": "base",
    "student, 10⁻³ nat": "student",
    "closer by the factor": "closer",
    "base: same token": "base agrees",
    "student: same token": "student agrees",
}

BASE = "base"
WITH_SEVI, ALIGNED = "base, SEVI", "flow-aligned"

NOTES = """\
Shares are in per cent, with 95 % bootstrap intervals (images, or prompts, resampled). Below each share is its
difference to the base, with the paired interval. One model is "significantly better" than another if the whole paired
interval of their difference lies on the better side of 0, and "significantly worse" if it lies on the worse side;
otherwise there is "no difference shown". One interval in twenty misses the true value, so among many comparisons a few
show a difference by chance."""
CLOSE_NOTES = """\
KL(teacher ‖ model) of the next token, the mean over the tokens of the teacher's answers to held-out prompts. The
teacher is the base under SEVI; the student runs without any method."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """A model, its method or None, and the name of its answers' folder."""

    path: str
    method: Method | None
    folder: str


@dataclasses.dataclass(frozen=True)
class Findings:
    """The scores of models on one benchmark.

    Attributes:
        scores: model -> contents of its `scores.json`.
        compare: (one, other) -> paired differences of their figures.
    """

    scores: Mapping[str, Mapping]
    compare: Callable[[str, str], Mapping]


def arms(base: str, student: str, sevi: Method) -> dict[str, Arm]:
    """The models that are compared, the base first."""
    return {
        BASE: Arm(base, None, "base"),
        WITH_SEVI: Arm(base, sevi, "base-sevi"),
        ALIGNED: Arm(student, None, "flow_alignment"),
    }


def document(config: ConfigDict, base: str, command: str, seconds: Mapping[str, float], parts: Iterable[str]) -> str:
    """The page: the settings of the run, and the parts with its results.

    Args:
        config: the settings of `configs/pocket_training.py`.
        base: checkpoint folder.
        command: the command line.
        seconds: time of each stage.
        parts: Markdown, each with a heading.
    """
    about = (
        f"{datetime.date.today().isoformat()}, {os.cpu_count()} x {platform.processor() or platform.machine()}, "
        f"{jax.devices()[0].device_kind}, Python {platform.python_version()}, jax {jax.__version__}, "
        f"lvlm_jax {__version__}, model {Path(base).name} {checkpoint_hash(base)[:12]}."
    )
    took = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    lines = ["# What training changes on the pocket model", "", f"    {command}", "", about, ""]
    lines += [f"Seconds, compilation and making of data included: {took}.", ""]
    lines += ["Settings (of a recipe, only those that differ from its defaults):", "", *changes(config), "", NOTES, ""]
    return "\n".join([*lines, *parts])


def section(findings: Mapping[str, Findings], close: Mapping[str, Mapping]) -> str:
    """The part of the page about flow alignment.

    Args:
        findings: name of a part of PARTS -> its findings.
        close: kind of answers -> report of `training.held_out.closeness`.
    """
    lines = ["## Flow alignment: SEVI in the weights", "", *words(findings, close), ""]
    lines += [pocket.markdown(part, findings[part.name].scores) for part in PARTS]
    lines += ["## How close to the edited teacher", "", CLOSE_NOTES, ""]
    return "\n".join([*lines, *pocket.table(CLOSE_COLUMNS, close, "answers"), ""])


def changes(config: ConfigDict) -> Iterator[str]:
    """Yields the settings of a run; for a recipe, only the settings that differ from its defaults."""
    recipes = {name: value for name, value in config.items() if "recipe" in _fields(value)}
    data = [
        " ".join(f"{word}" for word in (name, key, inner) if word != "")
        for name, value in config.items()
        for key, inner in _fields(value).items()
        if name not in recipes
    ]
    yield f"- data: {', '.join(data)}"
    for name, value in recipes.items():
        yield f"- {name}: {'; '.join(differences(settings.base(value.recipe).to_dict(), value.to_dict()))}"


def _fields(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, ConfigDict) else {"": value}


def words(findings: Mapping[str, Findings], close: Mapping[str, Mapping]) -> Iterator[str]:
    """Yields the comparisons as sentences, which follow from the intervals by rules, and a last sentence that counts
    them."""
    tally: dict[str, list[str]] = collections.defaultdict(list)
    for part in PARTS:
        scores = findings[part.name].scores
        for one, other in ((WITH_SEVI, BASE), (ALIGNED, BASE), (ALIGNED, WITH_SEVI)):
            against = findings[part.name].compare(one, other)
            judged = part.benchmark.judged_by(list(against))
            # Recall is shown too, because a model that names fewer objects also names fewer absent ones.
            for figure in (*judged, *(name for name in against if name == "recall")):
                direction = part.benchmark.direction(figure)
                says, sentence = compared(one, other, figure, scores, against[figure], direction)
                if other == BASE and figure in judged:
                    tally[says].append(f"{one} ({part.name})")
                yield f"- {part.name}: {sentence}"
    for kind, report in close.items():
        yield f"- {_closer(kind, report['figures'])}"
    better, worse = tally[verdicts.BETTER], tally[verdicts.WORSE]
    count = sum(map(len, tally.values()))
    yield (
        f"- Of {count} comparisons with the base, {len(better)} are for the model ({', '.join(better) or 'none'}), "
        f"{len(worse)} against it ({', '.join(worse) or 'none'}), and {count - len(better) - len(worse)} say nothing."
    )


def compared(
    one: str, other: str, figure: str, scores: Mapping[str, Mapping], difference: Mapping, direction: int = 1
) -> tuple[str, str]:
    """The verdict on `one` compared with `other`, and a sentence with the figures.

    Args:
        one, other: names of models in `scores`.
        difference: the paired difference, `one` minus `other`.
        direction: 1 if high values are good, -1 if low values are good.
    """
    values = [scores[name]["figures"][figure] for name in (one, other)]
    says = verdicts.verdict(difference["interval"], direction, values[0]["n"])
    if says == verdicts.NOT_DEFINED or any(value["value"] is None for value in values):
        return verdicts.NOT_DEFINED, f"{one} cannot be compared with {other} on {figure}."
    scale = 100 if values[0]["unit"] == "share" else 1
    change = [scale * number for number in (difference["value"], *difference["interval"])]
    pair = [scale * value["value"] for value in values]
    return says, verdicts.sentence(says, one, other, figure, pair, change, f"n {values[0]['n']}")


def _closer(kind: str, figures: Mapping[str, Mapping[str, Any]]) -> str:
    """A sentence: by what factor the student is closer to the teacher than the base is, for one kind of answers."""
    factor = figures["closer"]
    if factor["value"] is None or factor["interval"][0] is None:
        return f"closer to the teacher ({kind}): not defined, there is no distance to divide by."
    low, high = factor["interval"]
    says = "closer than" if low > 1 else "farther than" if high < 1 else "not shown to be closer than"
    return (
        f"closer to the teacher ({kind}): the student is {says} the base, by the factor {factor['value']:.2f} "
        f"({low:.2f} to {high:.2f}): {figures['student']['value']:.2f} against {figures['base']['value']:.2f} "
        "thousandths of a nat per token."
    )
