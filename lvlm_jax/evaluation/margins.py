"""How much a model prefers the right answer: log p(right) - log p(likeliest wrong option), of every question.

Right and wrong answers show little of a small change in a model. The margins show it, even for questions whose answers
stay the same. `evaluation.options` measures margins; this module writes and reads them, and computes figures from them.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lvlm_jax import files
from lvlm_jax.errors import LVLMError, shown
from lvlm_jax.evaluation.benchmark import Benchmark
from lvlm_jax.evaluation.protocol import Protocol
from lvlm_jax.evaluation.question import Question
from lvlm_jax.evaluation.scores import Figure, Scores, Totals, divide
from lvlm_jax.evaluation.shares import Key

FILE = "margins.jsonl"
MILLI = 1000.0
COUNTS = ("scored", "margin", "preferred")


def write(folder: Path, margins: Mapping[Key, Mapping]) -> Path:
    """Writes `margins.jsonl`, which has JSON lines `{group, question_id, margin}`."""
    rows = [
        {"group": group, "question_id": number, "margin": row["margin"]} for (group, number), row in margins.items()
    ]
    path = folder / FILE
    files.write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def beside(paths: Sequence[Path]) -> dict[Key, float]:
    """The margins in the files beside a run's answer files; empty without such files.

    Raises:
        LVLMError: a file is malformed.
    """
    margins: dict[Key, float] = {}
    for folder in dict.fromkeys(files.expand(path).parent for path in paths):
        if not (folder / FILE).is_file():
            continue
        for number, row in files.read_rows(folder / FILE, "file of margins"):
            where = f"line {number} of file of margins {str(folder / FILE)!r}"
            group = files.field(row, ("group",), str, where)
            key = group, str(files.field(row, ("question_id",), (int, str), where))
            margin = row.get("margin")
            if not isinstance(margin, int | float) or not math.isfinite(margin):
                raise LVLMError(f"{where}: margin is {shown(margin)}; expected a number")
            margins[key] = float(margin)
    return margins


def added(
    benchmark: Benchmark,
    scores: Scores,
    questions: Sequence[Question],
    margins: Mapping[Key, float],
    protocol: Protocol,
) -> Scores:
    """Adds the margins of questions to their scores; returns `scores` unchanged if a question has no margin."""
    if not questions or not all(question.key in margins for question in questions):
        return scores
    groups = list(dict.fromkeys(question.group for question in questions))
    names = [*COUNTS, *(f"{group}/{count}" for group in groups for count in COUNTS)]
    place = {unit: row for row, unit in enumerate(scores.units)}
    table = np.zeros((len(scores.units), len(names)))
    for question in questions:
        margin = margins[question.key]
        counted = (1.0, margin, float(margin > 0))
        for start in (0, len(COUNTS) * (1 + groups.index(question.group))):
            table[place[question.unit], start : start + len(COUNTS)] += counted
    counts = (*scores.counts, *names)
    figures = benchmark.figures(groups, counts, protocol)
    return dataclasses.replace(scores, counts=counts, table=np.hstack([scores.table, table]), figures=figures)


def figures(prefix: str = "") -> dict[str, Figure]:
    """The mean margin, in thousandths of a nat, and the share of questions whose right answer is the likeliest option.

    Args:
        prefix: prefix of the names of counts, such as "GROUP/".
    """
    scored, margin, preferred = (f"{prefix}{name}" for name in COUNTS)

    def mean(totals: Totals) -> np.ndarray:
        return MILLI * divide(totals[margin], totals[scored])

    def share(totals: Totals) -> np.ndarray:
        return divide(totals[preferred], totals[scored])

    return {"margin": Figure(mean, (scored,), "mnat"), "right is likeliest": Figure(share, (scored,))}
