"""Uncertainty of scores, and differences of two runs: bootstrap over images, paired bootstrap, McNemar's test.

Questions about one image are not independent, so images are resampled with all their questions (Efron and Tibshirani
1993, "An Introduction to the Bootstrap", chapters 8 and 13: percentile intervals). Everything is seeded.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np
from scipy.special import bdtr

from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation.scores import Scores

RESAMPLES = 2000
LEVEL = 0.95
_CHUNK = 256  # resamples at a time: 256 by 3000 images are 6 MB


def _weights(units: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields how often each image is drawn, for at most _CHUNK resamples at a time, [resamples, units]."""
    if resamples < 1:
        raise LVLMError(f"{resamples} resamples asked for; expected 1 or more")
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _CHUNK):
        rows = min(_CHUNK, resamples - start)
        indices = rng.integers(0, units, (rows, units)) + units * np.arange(rows)[:, None]
        yield np.bincount(indices.ravel(), minlength=rows * units).reshape(rows, units)


def _resampled(scores: Scores, resamples: int, seed: int) -> dict[str, np.ndarray]:
    """The values of every figure in all resamples, [resamples]."""
    if not scores.units:
        raise LVLMError("nothing was scored, so there is nothing to resample; give at least one answer")
    parts = [scores.values(weights) for weights in _weights(len(scores.units), resamples, seed)]
    return {name: np.concatenate([part[name] for part in parts]) for name in scores.figures}


def _interval(values: np.ndarray, level: float) -> tuple[float, float]:
    """Percentile interval; resamples in which the figure is undefined are left out."""
    defined = values[~np.isnan(values)]
    if not defined.size:
        return math.nan, math.nan
    low, high = np.quantile(defined, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def bootstrap(
    scores: Scores, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> dict[str, tuple[float, float]]:
    """Confidence interval (low, high) of every figure from resampled images; nan if the figure is never defined."""
    return {name: _interval(values, level) for name, values in _resampled(scores, resamples, seed).items()}


@dataclasses.dataclass(frozen=True)
class Difference:
    """First minus second, its interval, and a two-sided p-value: twice the share of resamples across 0."""

    value: float
    interval: tuple[float, float]
    p: float


def paired_bootstrap(
    first: Scores, second: Scores, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> dict[str, Difference]:
    """Differences of the figures of two runs over the same images; both use the same resamples.

    Raises:
        LVLMError: the two runs are not about the same images.
    """
    if set(first.units) != set(second.units):
        only = sorted(set(first.units) ^ set(second.units))
        raise LVLMError(f"the two runs are not about the same images ({len(only)} differ, first {only[0]!r})")
    order = {unit: i for i, unit in enumerate(second.units)}
    aligned = dataclasses.replace(second, units=first.units, table=second.table[[order[unit] for unit in first.units]])
    ours, theirs = (_resampled(scores, resamples, seed) for scores in (first, aligned))
    values, others = first.values(), second.values()
    differences = {}
    for name in first.figures:
        if name in second.figures:
            resampled = ours[name] - theirs[name]
            defined = resampled[~np.isnan(resampled)]
            tail = min((defined <= 0).sum(), (defined >= 0).sum())
            p = min(1.0, 2 * (tail + 1) / (defined.size + 1)) if defined.size else math.nan
            differences[name] = Difference(float(values[name] - others[name]), _interval(resampled, level), float(p))
    return differences


@dataclasses.dataclass(frozen=True)
class McNemar:
    """The numbers of questions that only the first, and only the second, answered correctly; the exact two-sided
    p-value."""

    first: int
    second: int
    p: float


def mcnemar(first: Mapping, second: Mapping) -> McNemar:
    """McNemar's exact test on right and wrong answers, by question (McNemar 1947; binomial with chance 1/2).

    Raises:
        LVLMError: the two runs answered different questions.
    """
    if first.keys() != second.keys():
        raise LVLMError(f"the two runs answered different questions ({len(first.keys() ^ second.keys())} differ)")
    only_first = sum(right and not second[key] for key, right in first.items())
    only_second = sum(right and not first[key] for key, right in second.items())
    tail = bdtr(min(only_first, only_second), only_first + only_second, 0.5)
    return McNemar(only_first, only_second, min(1.0, 2 * float(tail)))
