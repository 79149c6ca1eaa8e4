"""Yes/no answers: the confusion counts that POPE, MIHBench and AMBER share, and the figures made from them."""

from collections.abc import Sequence

from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation.question import Question
from lvlm_jax.evaluation.scores import Figure, Tally, divide, mean, ratio

# Whether a high value of a figure is good (1) or a low one (-1).
DIRECTIONS = {"accuracy": 1, "precision": 1, "recall": 1, "F1": 1, "unparsed": -1}
COUNTS = ("tp", "fp", "tn", "fn", "unparsed_positive", "unparsed_negative")


def label_of(question: Question) -> str:
    """A question's label as "yes" or "no". Raises `LVLMError` if it is neither."""
    label = (question.label or "").strip().lower()
    if label not in ("yes", "no"):
        raise LVLMError(f"question {question.id} of {question.group} has label {question.label!r}; expected yes or no")
    return label


def count(
    tally: Tally, question: Question, reply: str | None, positive: str = "yes", prefix: str | None = None
) -> None:
    """Counts one answer ("yes", "no" or None) under `prefix` (default: the question's group)."""
    prefix = question.group if prefix is None else prefix
    label = label_of(question)
    if reply is None:
        kind = "unparsed_positive" if label == positive else "unparsed_negative"
    elif reply == positive:
        kind = "tp" if label == positive else "fp"
    else:
        kind = "tn" if label != positive else "fn"
    tally.add(question.unit, **{f"{prefix}/{kind}": 1})
    tally.correct[question.key] = reply == label


def names(prefixes: Sequence[str]) -> list[str]:
    """Names of the counts of each prefix."""
    return [f"{prefix}/{kind}" for prefix in prefixes for kind in COUNTS]


def figures(prefix: str, unparsed_is_missed: bool = True) -> dict[str, Figure]:
    """Accuracy, precision, recall, F1, share of positive answers, and unparsed answers, from counts with one prefix.

    An unparsed answer is wrong. With `unparsed_is_missed` it also counts as a missed positive, so that recall is over
    all positive questions; lmms-eval leaves such questions out of recall.
    """
    all_counts = [f"{prefix}/{kind}" for kind in COUNTS]
    tp, fp, tn, fn, lost, _ = all_counts
    missed = [fn, lost] if unparsed_is_missed else [fn]

    def f1(totals):
        positives = sum(totals[name] for name in [tp, *missed])
        return divide(2 * totals[tp], totals[tp] + totals[fp] + positives)

    return {
        "accuracy": ratio([tp, tn], all_counts),
        "precision": ratio([tp], [tp, fp]),
        "recall": ratio([tp], [tp, *missed]),
        "F1": Figure(f1, tuple(all_counts)),
        "positive ratio": ratio([tp, fp], all_counts),
        "unparsed": ratio(all_counts[4:], all_counts),
    }


def table(groups: Sequence[str], positive: str = "yes", unparsed_is_missed: bool = True) -> dict[str, Figure]:
    """Figures of every group, as "group: figure", and for several groups their mean, as "mean: figure"."""
    by_group = {group: figures(group, unparsed_is_missed) for group in groups}
    all_figures = {}
    if len(groups) > 1:
        all_figures |= {
            f"mean: {name}": mean([by_group[group][name] for group in groups]) for name in by_group[groups[0]]
        }
    for group in groups:
        all_figures |= {f"{group}: {name}": figure for name, figure in by_group[group].items()}
    return {name.replace("positive ratio", f"{positive} ratio"): figure for name, figure in all_figures.items()}
