"""Bootstrap, paired bootstrap and McNemar against straight computations and known cases."""

import dataclasses
import math

import numpy as np
import pytest

from lvlm_jax.evaluation import statistics
from lvlm_jax.evaluation.scores import Tally, mean, ratio
from tests.reference import scorers
from tests.refusals import refused


def scores(right, per_image=1):
    """right: one truth value per question, `per_image` questions per image."""
    tally = Tally()
    for i, value in enumerate(right):
        tally.add(f"image{i // per_image}", asked=1, right=value)
        tally.correct["all", str(i)] = bool(value)
    return tally.scores(["asked", "right"], {"accuracy": ratio(["right"], ["asked"])}, {})


def accuracy(*given, **more):
    return statistics.bootstrap(*given, **more)["accuracy"]


def test_intervals():
    """The normal interval of a share of 0.8 among 400 is +- 0.039; images are drawn whole: where six questions an image
    are all right or all wrong, the interval is that of the images, not of the questions."""
    rng = np.random.default_rng(0)
    low, high = accuracy(scores(rng.random(400) < 0.8), 4000)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.8 * 0.2 / 400), rel=0.1)
    low, high = accuracy(scores(np.repeat(np.arange(50) % 2, 6), per_image=6), 4000)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 50), rel=0.15)


def test_same_resamples_as_a_plain_loop():
    rights = np.array([1, 0, 1, 1, 0, 1, 1])
    found, rng = scores(rights), np.random.default_rng(5)
    drawn = [rng.integers(0, 7, (min(256, 600 - start), 7)) for start in range(0, 600, 256)]
    expected = np.quantile([rights[row].mean() for rows in drawn for row in rows], (0.025, 0.975))
    assert accuracy(found, 600, seed=5) == pytest.approx(tuple(expected))
    assert accuracy(found, 600, seed=5) == accuracy(found, 600, seed=5) != accuracy(found, 600, seed=6)


def test_undefined_figures_have_no_interval():
    tally = Tally()
    tally.add("a", hits=0, claimed=0)
    found = tally.scores(["hits", "claimed"], {"precision": ratio(["hits"], ["claimed"])}, {})
    assert all(math.isnan(bound) for bound in statistics.bootstrap(found, 50)["precision"])
    refused("nothing was scored", statistics.bootstrap, Tally().scores(["a"], {}, {}), 50)
    tally = Tally()
    tally.add("a", x=1, y=3, n=4)
    found = tally.scores(["x", "y", "n"], {"mean": mean([ratio(["x"], ["n"]), ratio(["y"], ["n"])])}, {})
    assert found.values()["mean"] == 0.5 and found.sizes()["mean"] == 4


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(1)
    base = rng.random(300) < 0.6
    better = base.copy()
    better[np.flatnonzero(~base)[:15]] = True
    difference = statistics.paired_bootstrap(scores(better), scores(base), 4000)["accuracy"]
    low, high = difference.interval
    assert difference.value == pytest.approx(15 / 300) and difference.p < 0.01
    assert 0 < low < high and high - low < 0.06  # unpaired it would be about 0.15
    same = statistics.paired_bootstrap(scores(base), scores(base), 500)["accuracy"]
    assert (same.value, same.interval, same.p) == (0.0, (0.0, 0.0), 1.0)
    # It does not depend on the order of images.
    first, second = scores(base), scores(better)
    order = rng.permutation(300)
    shuffled = dataclasses.replace(second, units=tuple(second.units[i] for i in order), table=second.table[order])
    assert statistics.paired_bootstrap(first, second, 300) == statistics.paired_bootstrap(first, shuffled, 300)
    refused("not about the same images", statistics.paired_bootstrap, first, scores([1]), 300)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (5, 0), (10, 2), (7, 7), (60, 41), (300, 250)])
def test_mcnemar(first, second):
    keys = range(first + second + 5)
    ours = {key: key < first or key >= first + second for key in keys}
    theirs = {key: key >= first for key in keys}
    found = statistics.mcnemar(ours, theirs)
    assert (found.first, found.second) == (first, second)
    assert found.p == pytest.approx(scorers.mcnemar(first, second), rel=1e-9)


def test_mcnemar_of_thousands_and_of_different_questions():
    ours, theirs = (dict.fromkeys(range(3000), right) for right in (True, False))
    assert 0 < statistics.mcnemar(ours, theirs).p + 1e-300 < 1e-200
    refused(r"different questions \(1 differ\)", statistics.mcnemar, {1: True}, {})
