"""Comparisons for a report: which runs may be subtracted from each other, and the differences of their figures.

Figures of two runs can be compared only if protocol, question files, image list and parser are the same. The records of
the runs decide: where they differ, the report gives the reasons instead of a difference.
"""

import functools
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import rescore
from lvlm_jax.evaluation.report.runs import Comparison, Run, comparison_of
from lvlm_jax.evaluation.scores import Scores


def differing(first: Run, second: Run) -> list[str]:
    """The reasons why figures of two runs cannot be compared, in words; empty if they can."""
    ours, theirs = first.conditions, second.conditions
    return [
        f"{name} {ours.get(name, 'none')} instead of {theirs.get(name, 'none')}"
        for name in dict.fromkeys([*ours, *theirs])
        if ours.get(name) != theirs.get(name)
    ]


def restored(run: Run) -> Scores:
    """The scores of a run with the functions of their figures, for resampling.

    The benchmark makes these functions; their values must equal the stored ones.

    Raises:
        LVLMError: the values differ, because the run was scored by a version with other formulas.
    """
    groups = list(dict.fromkeys(group for group, _ in run.correct))
    by_name = run.benchmark.figures(groups, run.counts, run.protocol)
    figures = {name: by_name[name] for name in run.figures if name in by_name}
    scores = Scores(run.units, run.counts, run.table, figures, run.correct, run.notes)
    try:
        values = scores.values()
    except KeyError as error:
        raise LVLMError(f"{run.name} was scored without the count {error}; score it again") from error
    for name, value in values.items():
        if not np.isclose(value, run.figures[name].value, rtol=0, atol=2e-6, equal_nan=True):
            raise LVLMError(
                f"{run.name} has {name} {run.figures[name].value}, this version finds {value:.6f}; score it again"
            )
    return scores


def compare(runs: Sequence[Run]) -> dict[Run, Comparison | str]:
    """The comparison of every run with a method to the same model without one, or a text that says why there is none.

    The run without a method must have the same model, protocol, files, images and questions. If there is no such run,
    the comparison that was stored with the scores (`--against`) is used.
    """
    scores = functools.cache(restored)
    baselines = defaultdict(list)
    for run in runs:
        if run.is_baseline:
            baselines[run.protocol.name, run.model].append(run)
    comparisons: dict[Run, Comparison | str] = {}
    for run in runs:
        if run.is_baseline:
            continue
        others = baselines[run.protocol.name, run.model]
        alike = [other for other in others if not differing(run, other)]
        if alike:
            # A run with the same seed is preferred.
            chosen = min(alike, key=lambda other: other.record.get("seed") != run.record.get("seed"))
            comparisons[run] = _minus(run, chosen, scores)
        elif run.against:
            comparisons[run] = run.against
        elif others:
            comparisons[run] = "; ".join(differing(run, others[0]))
        else:
            comparisons[run] = "no run of this model without a method under this protocol"
    return comparisons


def _minus(run: Run, baseline: Run, scores) -> Comparison | str:
    bootstrap = run.record["bootstrap"]
    try:
        comparison = rescore.compare(scores(run), scores(baseline), bootstrap["resamples"], bootstrap["seed"])
    except LVLMError as error:
        return str(error)
    return comparison_of(baseline.method[0], baseline, comparison)
