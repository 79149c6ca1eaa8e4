"""Controls: trivial changes that a method must beat, run beside it, and the verdicts in words.

Most of what contrastive decoding gains on POPE comes from two side effects (Yin et al. 2025, arXiv 2504.10020): the
share of "yes" shifts, and sampling becomes nearly greedy because the plausibility cut leaves few tokens. Captions
improve CHAIR by becoming shorter. Each control has exactly one of these effects:

greedy         no method, temperature 0
temperature    no method, sampling at temperature 1
plausibility   only the cut: sampling at temperature 1 from the tokens v with l[v] >= max l + ln β, where β is the
               method's own (0.1 for a method without a cut)
OLM            yes/no questions: "yes" if p(yes) + p(no) > 0.2 and |p(yes) - p(no)| < 0.5 for the first token of the
               answer; else the answer of greedy decoding, or for "sampled" that of temperature 1
PBA            yes/no questions: no method, the prompt ends with " Answer yes whenever possible."; greedy and sampled
threshold      yes/no questions: "yes" if greedy decoding's log-odds of yes against no, for the first token of the
               answer, exceed a threshold, which gives each group the method's share of yes
length         captions: the first n words of the greedy caption of each image, where n is the number of words of the
               method's caption of that image; the protocol's truncation rule is applied to both first

OLM and PBA come from the paper of Yin et al. Greedy, temperature, plausibility and PBA run the model (`decodings`).
OLM and threshold need one pass over the prompts (`log_odds`), and length needs nothing. Controls whose runs were not
requested, or that an older folder of controls lacks, are left out.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lvlm_jax import parallel
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import parsers, rescore
from lvlm_jax.evaluation.benchmark import Benchmark
from lvlm_jax.evaluation.engine import DEFAULT, Work, collect
from lvlm_jax.evaluation.parsers import truncated
from lvlm_jax.evaluation.protocol import Protocol
from lvlm_jax.evaluation.question import Question
from lvlm_jax.evaluation.shares import Key
from lvlm_jax.generation.output import NOT_FINITE
from lvlm_jax.methods import Method, Strength, strength
from lvlm_jax.methods.base import frozen
from lvlm_jax.methods.chain import Chained
from lvlm_jax.methods.cuts import plausible

CUT = 0.1  # β for methods without one
PBA = " Answer yes whenever possible."
OLM_KNOWN, OLM_NEAR = 0.2, 0.5  # p(yes) + p(no) must exceed the first, their distance must be below the second
RUNS = ("greedy", "temperature", "plausibility", "pba", "pba-sampled")  # the controls that are runs of the model
ABOUT = {
    "greedy": "greedy decoding",
    "temperature": "sampling at temperature 1",
    "plausibility": "the plausibility cut alone",
    "threshold": "a yes/no threshold with the same share of yes",
    "olm": "yes if yes and no are close (OLM), greedy",
    "olm-sampled": "yes if yes and no are close (OLM), sampled",
    "pba": "a prompt that asks for yes (PBA), greedy",
    "pba-sampled": "a prompt that asks for yes (PBA), sampled",
    "length": "greedy captions of the same length",
}


@frozen
class PlausibilityCut(Method):
    """Only the plausibility cut of contrastive methods; not registered, because it is a control and not a method."""

    beta: Strength = strength(CUT, "plausibility cut β", low=0, high=1)

    def combine(self, readout, memory):
        return plausible(readout.main, readout.main, self.beta), memory


def own_cut(method: Method) -> float:
    """β of a method's plausibility cut, or of the first cut in a chain of methods; 0.1 if there is no cut."""
    for member in method.members if isinstance(method, Chained) else (method,):
        for field in dataclasses.fields(member):
            if field.metadata.get("doc", "").startswith("plausibility cut"):
                return float(str(getattr(member, field.name)))  # a float32 of 0.2 becomes 0.2 again
    return CUT


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A control that is a run of the model.

    Attributes:
        folder: name of the folder for its answers; controls that depend on the method have different folders.
        yes_no: whether it answers only the yes/no questions.
    """

    name: str
    folder: str
    protocol: Protocol
    method: Method | None
    yes_no: bool = False


def decodings(protocol: Protocol, method: Method) -> list[Decoding]:
    """The controls of a method that are runs of the model."""
    greedy = dataclasses.replace(protocol, temperature=0.0, top_p=1.0)
    sampled = dataclasses.replace(protocol, temperature=1.0, top_p=1.0)
    beta = own_cut(method)
    for_yes = [dataclasses.replace(rule, suffix=rule.suffix + PBA) for rule in (greedy, sampled)]
    return [
        Decoding("greedy", "greedy", greedy, None),
        Decoding("temperature", "temperature", sampled, None),
        Decoding("plausibility", f"plausibility-{beta:g}", sampled, PlausibilityCut(beta)),
        Decoding("pba", "pba", for_yes[0], None, yes_no=True),
        Decoding("pba-sampled", "pba-sampled", for_yes[1], None, yes_no=True),
    ]


def is_yes_no(question: Question) -> bool:
    """Whether the right answer is yes or no."""
    return (question.label or "").strip().lower() in ("yes", "no")


def answer_words(tokenizer: Any) -> tuple[list[int], list[int]]:
    """First tokens of "yes" and of "no", in any case, with and without a blank before.

    Only spellings that are one token count. If "yes" or "no" has no such spelling, the first tokens of all spellings
    count. Tokens that both words share are left out.

    Raises:
        LVLMError: both words begin with the same token.
    """

    def pieces(word: str) -> list[list[int]]:
        writings = [blank + form for blank in ("", " ") for form in (word, word.capitalize(), word.upper())]
        return [tokenizer(writing, add_special_tokens=False)["input_ids"] for writing in writings]

    by_word = [pieces(word) for word in ("yes", "no")]
    single_tokens = [{ids[0] for ids in spellings if len(ids) == 1} for spellings in by_word]
    if not all(single_tokens):
        single_tokens = [{ids[0] for ids in spellings} for spellings in by_word]
    yes, no = single_tokens[0] - single_tokens[1], single_tokens[1] - single_tokens[0]
    if not yes or not no:
        raise LVLMError(
            "the tokenizer gives yes and no the same first token, so controls have no log-odds; leave --controls out"
        )
    return sorted(yes), sorted(no)


def log_odds(
    model: Any, questions: Sequence[Question], protocol: Protocol, work: Work = DEFAULT, title: str = "yes/no log-odds"
) -> dict[Key, float]:
    """ln p(yes) - ln p(no) of the first answer token under plain decoding, by question.

    Args:
        questions: questions with yes/no answers.
        work: its logs are called "odds"; they also contain p(yes) and p(no).
    """
    yes, no = answer_words(model.processor.tokenizer)

    def respond(messages: list[list[dict]], seeds: list[int], batch: list[Question]) -> list[dict]:
        logits = np.asarray(parallel.local(model.prefill(messages)[1].combined), np.float64)
        if np.isnan(logits).any() or np.isposinf(logits).any():
            raise LVLMError(f"the logits of the first answer token {NOT_FINITE}")
        masses = [np.logaddexp.reduce(logits[:, words], axis=1) for words in (yes, no)]
        chances = np.exp(np.stack(masses) - np.logaddexp.reduce(logits, axis=1))
        rows = zip(masses[0] - masses[1], *chances, strict=True)
        return [
            dict(zip(("odds", "yes", "no"), (round(float(value), 6) for value in row), strict=True)) for row in rows
        ]

    plain = dataclasses.replace(protocol, temperature=0.0, top_p=1.0)
    rows_by_key = collect(model, questions, plain, respond, work, "odds", title)
    return {key: row["odds"] for key, row in rows_by_key.items()}


def said_yes(questions: Sequence[Question], answers: Mapping[Key, str], protocol: Protocol) -> list[bool]:
    """Which answers the protocol's parser reads as yes."""
    # "short" and "letter" are not yes/no parsers; they use the parser of `mihbench.score`.
    parse = parsers.YES_NO.get(protocol.parser, parsers.strict)
    return [parse(answers[one.key], one.label.strip().lower()) == "yes" for one in questions]


def fitted_threshold(odds: Sequence[float], yes: int) -> float:
    """The threshold for which the number of log-odds above it is closest to `yes`; on ties the higher threshold.

    It lies half-way between two log-odds, or beyond all of them.
    """
    levels = np.unique(np.asarray(odds, float))
    between = np.concatenate([[levels[0] - 1], (levels[1:] + levels[:-1]) / 2, [levels[-1] + 1]])
    counts_above = (np.asarray(odds)[:, None] > between).sum(axis=0)
    miss = np.abs(counts_above - yes)
    return float(between[np.flatnonzero(miss == miss.min())[-1]])


def thresholded(
    questions: Sequence[Question], odds: Mapping[Key, float], answers: Mapping[Key, str], protocol: Protocol
) -> tuple[dict[Key, str], dict[str, float]]:
    """The threshold control's answers ("Yes" or "No"), and the threshold of each group.

    Args:
        questions: questions with yes/no answers.
        answers: the answers under the method.
    """
    texts, thresholds = {}, {}
    for group in dict.fromkeys(question.group for question in questions):
        members = [question for question in questions if question.group == group]
        values = [odds[question.key] for question in members]
        thresholds[group] = fitted_threshold(values, sum(said_yes(members, answers, protocol)))
        for question, value in zip(members, values, strict=True):
            texts[question.key] = "Yes" if value > thresholds[group] else "No"
    return texts, thresholds


def near_to_yes(chances: Mapping[Key, tuple[float, float]], texts: Mapping[Key, str]) -> dict[Key, str]:
    """OLM's answers: "Yes" if p(yes) and p(no) of the first token (`chances`) are close, else those in `texts`."""
    return {
        key: "Yes" if yes + no > OLM_KNOWN and abs(yes - no) < OLM_NEAR else texts[key]
        for key, (yes, no) in chances.items()
    }


def length_matched(greedy: str, other: str, truncate: str = "none") -> str:
    """The greedy caption, cut to the number of words (between blanks) of the other caption."""
    words = truncated(greedy, truncate).split()
    return " ".join(words[: len(truncated(other, truncate).split())])


@dataclasses.dataclass(frozen=True)
class ControlAnswers:
    """The answers of one run's controls, by question.

    Attributes:
        texts: answers by control, for the controls that were run.
        odds: ln p(yes) - ln p(no) of yes/no questions.
        chances: p(yes) and p(no) of the first answer token; empty if the logs are too old to have them.
    """

    texts: Mapping[str, Mapping[Key, str]]
    odds: Mapping[Key, float]
    chances: Mapping[Key, tuple[float, float]] = dataclasses.field(default_factory=dict)


def report(
    benchmark: Benchmark,
    questions: Sequence[Question],
    answers: Mapping[Key, str],
    protocol: Protocol,
    control_answers: ControlAnswers,
    resamples: int,
    seed: int = 0,
) -> dict:
    """Every control's figures and the comparison with the method, as plain JSON values, with a verdict in words.

    Args:
        answers: the answers under the method.
        control_answers: answers of greedy decoding to all questions, and of the other requested runs; log-odds of
            the yes/no questions.
        resamples, seed: number of resamples and seed of the bootstrap.
    """
    comparisons = {}

    def compare(name: str, subset: Sequence[Question], texts: Mapping, rule: Protocol, ours: Mapping) -> dict:
        method, control = (benchmark.score(subset, batch_texts, rule) for batch_texts in (ours, texts))
        against = rescore.compare(method, control, resamples, seed)
        comparisons[name] = {
            "about": ABOUT[name],
            "questions": len(subset),
            "images": len({image for question in subset for image in question.image_names}),
            "figures": rescore.report(control, resamples, seed)["figures"],
            "against": against,
        } | rescore.judged(benchmark, "the method", ABOUT[name], method, control, against["differences"])
        return comparisons[name]

    for name in (name for name in ("greedy", "temperature", "plausibility") if name in control_answers.texts):
        compare(name, questions, control_answers.texts[name], protocol, answers)
    binary = [question for question in questions if is_yes_no(question)]
    if binary:
        texts, thresholds = thresholded(binary, control_answers.odds, answers, protocol)
        compare("threshold", binary, texts, protocol, answers)["thresholds"] = thresholds
        if all(question.key in control_answers.chances for question in binary):
            for name, otherwise in (("olm", "greedy"), ("olm-sampled", "temperature")):
                if otherwise not in control_answers.texts:
                    continue
                texts = near_to_yes(control_answers.chances, control_answers.texts[otherwise])
                compare(name, binary, texts, protocol, answers)
        for name in ("pba", "pba-sampled"):
            if name in control_answers.texts:
                compare(name, binary, control_answers.texts[name], protocol, answers)
    captions = [question for question in questions if question.label is None]
    if captions:
        ours = {one.key: truncated(answers[one.key], protocol.truncate) for one in captions}
        theirs = control_answers.texts["greedy"]
        cut = {one.key: length_matched(theirs[one.key], answers[one.key], protocol.truncate) for one in captions}
        whole = dataclasses.replace(protocol, truncate="none")
        shorter = sum(len(cut[one.key].split()) < len(ours[one.key].split()) for one in captions)
        compare("length", captions, cut, whole, ours)["shorter_than_the_method"] = shorter
    return comparisons
