"""A wrong answer to every prompt, and the share of pairs that a policy wins by contradicting the model.

If pairs are kept only where a model is wrong, they have one thing in common: the model does not give the chosen answer.
A policy that says the opposite of the model, whatever the image shows, wins all of them, held-out ones too. So
every prompt should give a pair. Its rejected answer is the first of these that is wrong (the ladder):

    answer   the model's answer on the rejected side
    sample   an answer that is sampled from the model on the rejected side
    option   another answer that the question could have, from the prompt's field `wrong`
"""

from collections.abc import Sequence

from lvlm_jax.errors import LVLMError
from lvlm_jax.journal.log import seed_of
from lvlm_jax.training.data.pair_filters import Candidate, normalised, words
from lvlm_jax.training.data.prompts import Prompt

RUNGS = ("answer", "sample", "option")
_YES_NO = ("yes", "no")


def alike(one: str, other: str) -> bool:
    """Whether two answers are equal apart from case and punctuation, or both begin with yes, or both with no."""
    if normalised(one) == normalised(other):
        return True
    first = [(words(text) or [""])[0] for text in (one, other)]
    return first[0] == first[1] and first[0] in _YES_NO


def check(prompts: Sequence[Prompt]) -> None:
    """Raises an `LVLMError` for prompts without a right answer."""
    for prompt in prompts:
        if prompt.truth is None:
            raise LVLMError(
                f"--ladder needs the truth of every prompt, and {prompt.id} has none; give their lines a field truth, "
                "or --no-ladder"
            )


def rejected(prompt: Prompt, answer: str, samples: Sequence[str], seed: int) -> tuple[str, str]:
    """The rejected answer of a prompt with a truth, and the rung of the ladder that gives it.

    Args:
        answer: the model's answer on the rejected side.
        samples: further answers of the model on the rejected side.
        seed: seed of the draw among the wrong options.

    Returns:
        (rejected answer, one of RUNGS); `answer` and the first rung if no answer is wrong.
    """
    if not alike(answer, prompt.truth):
        return answer, RUNGS[0]
    for sample in samples:
        if sample and not alike(sample, prompt.truth):
            return sample, RUNGS[1]
    options = [option for option in prompt.wrong if not alike(option, prompt.truth)]
    if options:
        return options[seed_of(seed, f"option/{prompt.id}") % len(options)], RUNGS[2]
    return answer, RUNGS[0]


def explained(candidates: Sequence[Candidate]) -> float | None:
    """The share of pairs that a policy wins by contradicting the model; None if the model's own answers are unknown."""
    known = [one for one in candidates if one.own is not None]
    if not known:
        return None
    return round(sum(negated(one.own, one.chosen, one.rejected) for one in known) / len(known), 4)


def negated(own: str, chosen: str, rejected: str) -> float:
    """The share of a pair that contradicting the model wins: 1 if it wins the pair, 0 if it loses the pair.

    Args:
        own: the model's own answer; if it is neither of the two answers, chance wins half of the pair.
    """
    for same in (lambda one, other: normalised(one) == normalised(other), alike):
        if same(own, chosen):
            return 0.0
        if same(own, rejected):
            return 1.0
    return 0.5


def refuse_negation(share: float | None, count: int, most: float) -> None:
    """Raises an `LVLMError` if contradicting the model wins more than `most` of the pairs.

    Args:
        share: the share of pairs that contradicting the model wins, from `explained`.
        count: number of pairs.
        most: the largest allowed share.
    """
    if share is not None and share > most:
        raise LVLMError(
            f"{100 * share:.1f} % of {count} pairs are won by a policy that only contradicts the model, and training "
            f"would learn just that; the limit is {100 * most:g} %: add pairs of prompts that the model answers right "
            "(--ladder), or raise --max-negation"
        )
