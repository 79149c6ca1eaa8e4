"""The effects of training on the pocket benchmark: compared models, tables, and conclusions in words.

CAPL and its ablation, plain DPO, are judged by questions over several images; flow alignment by POPE and CHAIR. Trained
models are compared with their base model and with the method that needs no training.
"""

import collections
import dataclasses
import datetime
import os
import platform
from collections.abc import Callable, Iterator, Mapping
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

# One word is asked for: a sentence about which image it is would be no label.
SEVERAL = dataclasses.replace(
    pocket.MULTI_IMAGE,
    title="Questions over two to four images, to be answered by one word (accuracy)",
    protocol="mihbench/short",
)
PARTS = (SEVERAL, pocket.POPE, pocket.CHAIR)
PAIR_COLUMNS = {
    "truncated: chosen likelier": "truncated: chosen likelier",
    "truncated: moved to chosen": "truncated: moved",
    "plain: chosen likelier": "plain: chosen likelier",
    "plain: moved to chosen": "plain: moved",
}
CLOSE_COLUMNS = {
    "base, 10⁻³ nat": "base",
    "student, 10⁻³ nat": "student",
    "closer by the factor": "closer",
    "base: same token": "base agrees",
    "student: same token": "student agrees",
}

BASE = "base"
WITH_CAPL, CAPL, CAPL_WITH, DPO = (
    "base, CAPL's attention",
    "CAPL-trained",
    "CAPL-trained, CAPL's attention",
    "DPO-trained",
)
WITH_SEVI, ALIGNED = "base, SEVI", "flow-aligned"
# Comparisons in words, besides each model with the base.
BESIDE = ((CAPL_WITH, WITH_CAPL), (CAPL_WITH, DPO), (CAPL, DPO), (ALIGNED, WITH_SEVI))

NOTES = """\
Shares are in per cent, with 95 % bootstrap intervals (images, or prompts, resampled); below them the difference to the
base with its paired interval. One is "significantly better" than the other where the paired interval of their
difference lies on the better side of 0, "significantly worse" where it lies on the worse one; else there is "no
difference shown". Each interval is wrong once in twenty times, so with many of them some say more than there is."""
PAIR_NOTES = """\
Pairs about pictures that no training has seen. The chosen answer is the truth, the rejected one what the base said
otherwise, under truncated attention or (plain) unmodified and sampled: most of the former it prefers by their making.
"Moved": the chosen answer has gained more likelihood over the base than the rejected one, both models under the
attention of the row; half of the pairs would by chance."""
CLOSE_NOTES = """\
KL(teacher ‖ model) of the next token, mean over the tokens of held-out answers that the teacher gave. The teacher is
the base under SEVI, the student runs without any method."""


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


def arms(base: str, trained: Callable[[str], str], capl: Method, sevi: Method) -> tuple[dict[str, Arm], dict[str, Arm]]:
    """The models for questions about several images, and those for questions about one.

    Args:
        trained: recipe -> checkpoint.
    """
    several = {
        BASE: Arm(base, None, "base"),
        WITH_CAPL: Arm(base, capl, "base-capl"),
        CAPL_WITH: Arm(trained("capl"), capl, "capl-capl"),
        CAPL: Arm(trained("capl"), None, "capl"),
        DPO: Arm(trained("dpo"), None, "dpo"),
    }
    one = {
        BASE: several[BASE],
        WITH_SEVI: Arm(base, sevi, "base-sevi"),
        ALIGNED: Arm(trained("flow_alignment"), None, "flow_alignment"),
    }
    return several, one


def document(
    config: ConfigDict,
    base: str,
    command: str,
    seconds: Mapping[str, float],
    statistics: Mapping[str, Mapping],
    found: Mapping[str, Findings],
    pairs: Findings,
    close: Mapping[str, Mapping],
) -> str:
    """The page: the setup, the conclusions in words, and the tables.

    Args:
        config: of `configs/pocket_training.py`.
        base: checkpoint folder.
        command: that made it.
        seconds: of each stage.
        statistics: of each set of pairs, as `training.pairs` writes them.
        found: by name of a part of PARTS.
        pairs: held-out pairs.
        close: kind of answers -> report of `training.held_out.closeness`.
    """
    about = (
        f"{datetime.date.today().isoformat()}, {os.cpu_count()} x {platform.processor() or platform.machine()}, "
        f"{jax.devices()[0].device_kind}, Python {platform.python_version()}, jax {jax.__version__}, "
        f"lvlm_jax {__version__}, model {Path(base).name} {checkpoint_hash(base)[:12]}."
    )
    kept = [f"{name} {figures['kept']} of {figures['prompts']} prompts" for name, figures in statistics.items()]
    took = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    lines = ["# What training changes on the pocket model", "", f"    {command}", "", about, ""]
    lines += [f"Seconds, programs compiled and data made on the way included: {took}.", ""]
    lines += [f"Pairs to learn from: {', '.join(kept)}. Other settings than the recipes' defaults:", ""]
    lines += [*changes(config), "", NOTES, "", "## What came of it", "", *words(found, pairs, close), ""]
    lines += [pocket.markdown(part, found[part.name].scores) for part in PARTS]
    lines += ["## Held-out pairs (accuracy)", "", PAIR_NOTES, "", *pocket.table(PAIR_COLUMNS, pairs.scores)]
    lines += ["", "## How close to the edited teacher", "", CLOSE_NOTES, ""]
    return "\n".join([*lines, *pocket.table(CLOSE_COLUMNS, close, "answers"), ""])


def changes(config: ConfigDict) -> Iterator[str]:
    """Lists the settings of a run; of a recipe only those that differ from the defaults."""
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


def words(found: Mapping[str, Findings], pairs: Findings, close: Mapping[str, Mapping]) -> Iterator[str]:
    """Lists the differences between models, by a rule on intervals; last, what helped and what harmed."""
    tally: dict[str, list[str]] = collections.defaultdict(list)
    for part in PARTS:
        scores = found[part.name].scores
        for one, other in _pairs_of(scores):
            against = found[part.name].compare(one, other)
            judged = part.benchmark.judged_by(list(against))
            # Who names less, names less that is not there.
            for figure in (*judged, *(name for name in against if name == "recall")):
                direction = part.benchmark.direction(figure)
                says, sentence = _sentence(one, other, figure, scores, against[figure], direction)
                if other == BASE and figure in judged:
                    tally[says].append(f"{one} ({part.name})")
                yield f"- {part.name}: {sentence}"
    for figure in (name for name in PAIR_COLUMNS.values() if name.endswith("likelier")):
        for one in (CAPL_WITH, CAPL, DPO):
            sentence = _sentence(one, BASE, figure, pairs.scores, pairs.compare(one, BASE)[figure])[1]
            yield f"- held-out pairs: {sentence}"
    for kind, report in close.items():
        yield f"- {_closer(kind, report['figures'])}"
    better, worse = tally[verdicts.BETTER], tally[verdicts.WORSE]
    count = sum(map(len, tally.values()))
    yield (
        f"- Of {count} comparisons with the base, {len(better)} are for the model ({', '.join(better) or 'none'}), "
        f"{len(worse)} against it ({', '.join(worse) or 'none'}), and {count - len(better) - len(worse)} say nothing."
    )


def _pairs_of(scores: Mapping) -> Iterator[tuple[str, str]]:
    yield from ((name, BASE) for name in scores if name != BASE)
    yield from (both for both in BESIDE if all(name in scores for name in both))


def _sentence(
    one: str, other: str, figure: str, scores: Mapping[str, Mapping], difference: Mapping, direction: int = 1
) -> tuple[str, str]:
    """The verdict, and a sentence with its figures."""
    values = [scores[name]["figures"][figure] for name in (one, other)]
    says = verdicts.verdict(difference["interval"], direction, values[0]["n"])
    if says == verdicts.NOT_DEFINED or any(value["value"] is None for value in values):
        return verdicts.NOT_DEFINED, f"{one} cannot be compared with {other} on {figure}."
    scale = 100 if values[0]["unit"] == "share" else 1
    change = [scale * number for number in (difference["value"], *difference["interval"])]
    pair = [scale * value["value"] for value in values]
    return says, verdicts.sentence(says, one, other, figure, pair, change, f"n {values[0]['n']}")


def _closer(kind: str, figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The factor for one kind of answers, in words."""
    factor = figures["closer"]
    if factor["value"] is None or factor["interval"][0] is None:
        return f"closer to the teacher ({kind}): not defined, there is no distance to divide by."
    low, high = factor["interval"]
    says = "closer than" if low > 1 else "farther than" if high < 1 else "not told from"
    return (
        f"closer to the teacher ({kind}): the student is {says} the base, by the factor {factor['value']:.2f} "
        f"({low:.2f} to {high:.2f}): {figures['student']['value']:.2f} against {figures['base']['value']:.2f} "
        "thousandths of a nat per token."
    )
