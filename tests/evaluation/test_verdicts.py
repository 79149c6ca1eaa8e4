"""Verdicts: from an interval, for which questions, and with too few questions."""

import math

from lvlm_jax.evaluation import BENCHMARKS, verdicts

ABOVE, BELOW = (0.1, 0.2), (-0.2, -0.1)


def test_verdicts_follow_the_intervals():
    for interval, direction, questions, says in (
        (ABOVE, 1, 30, "significantly better"),
        (ABOVE, -1, 30, "significantly worse"),
        (BELOW, 1, 30, "significantly worse"),
        (BELOW, -1, 30, "significantly better"),
        (ABOVE, 0, 30, "significantly higher"),
        (BELOW, 0, 30, "significantly lower"),
        ((0.0, 0.2), 1, 30, "no difference shown"),
        ((-0.1, 0.0), -1, 30, "no difference shown"),
        (ABOVE, 1, 29, "no verdict below 30 questions"),
        ((None, None), 1, 3000, "not defined"),
        ((math.nan, math.nan), 1, 29, "not defined"),
    ):
        assert verdicts.verdict(interval, direction, questions) == says


def test_figures_that_judge_are_about_the_questions_of_their_group():
    correct = [("random", str(i)) for i in range(40)] + [("popular", str(i)) for i in range(20)]
    sizes = {"random: precision": 7, "mean: accuracy": 60, "mean: F1": 60, "C_I": 300, "attribute: accuracy": 25}
    asked = {"random: precision": 40, "mean: F1": 60, "C_I": 60, "attribute: recall": 25, "odd: C_S": 60}
    assert {name: verdicts.questions_behind(name, sizes, correct) for name in asked} == asked
    assert BENCHMARKS["pope"].judged_by(["mean: recall", "mean: accuracy", "random: accuracy"]) == ["mean: accuracy"]
    names = ["Hal", "Cog", "discriminative: accuracy"]
    assert BENCHMARKS["amber"].judged_by(names) == ["discriminative: accuracy", "Hal"]
