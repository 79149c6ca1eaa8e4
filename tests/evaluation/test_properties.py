"""A thousand random answer sets through our scorers and through the straight ones of tests/reference/scorers.py."""

import math

import numpy as np
import pytest

from lvlm_jax.evaluation import binary, get
from lvlm_jax.evaluation.benchmarks import amber, chair, choices, mihbench, mme, pope
from lvlm_jax.evaluation.chair_words import Lexicon
from lvlm_jax.evaluation.parsers import letter
from lvlm_jax.evaluation.question import Question
from tests.reference import scorers

SETS = 1000
PIECES = ["Yes", "No", "yes", "no", "NO", "YES", "not", "Not", "isn't", "maybe", "know", "yesterday", "a dog", "none",
          "Yes.", "No,", "no.", ",", ".", ". ", " ", "\n", "", "-no-", "yes/no", "_no"]  # fmt: skip


def words(rng):
    """Something like an answer: up to four pieces, joined by blanks or by nothing."""
    joined = " " if rng.random() < 0.7 else ""
    return joined.join(PIECES[i] for i in rng.integers(0, len(PIECES), rng.integers(0, 5)))


def same(found, expected):
    """Every expected figure is found; None is nan."""
    for name, value in expected.items():
        if value is None:
            assert math.isnan(found[name]), name
        else:
            assert float(found[name]) == pytest.approx(value, abs=1e-12), name


def picture(i):
    return (f"image{i}".encode(),)


@pytest.mark.parametrize("parser", ["strict", "official", "opera", "vcd", "lmms-eval"])
def test_pope(parser):
    rng = np.random.default_rng(0)
    protocol = get(f"pope/{parser}")
    for _ in range(SETS // 5):
        splits = pope.SPLITS[: rng.integers(1, 4)]
        rows = [
            {"split": split, "text": words(rng), "label": ("yes", "no")[rng.integers(2)]}
            for split in splits
            for _ in range(rng.integers(1, 12))
        ]
        questions = [Question(i, picture(i // 3), "?", row["label"], row["split"]) for i, row in enumerate(rows)]
        answers = {q.key: row["text"] for q, row in zip(questions, rows, strict=True)}
        scores = pope.score(questions, answers, protocol)
        expected = scorers.pope(rows, parser)
        assert set(scores.figures) == set(expected)
        same(scores.values(), expected)
        rights = [scorers.pope_parse(parser, row["text"], row["label"]) == row["label"] for row in rows]
        assert list(scores.correct.values()) == rights


def test_chair():
    rng = np.random.default_rng(1)
    names = [f"thing{i}" for i in range(6)]
    lexicon = Lexicon({name: name for name in names}, {}, "test")
    for _ in range(SETS):
        questions, answers, rows = [], {}, []
        for i in range(rng.integers(1, 6)):
            truth = frozenset(name for name in names if rng.random() < 0.3)
            mentions = [names[j] for j in rng.integers(0, 6, rng.integers(0, 5))]
            question = Question(i, picture(i), "", None, "captions", {"objects": truth, "lexicon": lexicon})
            questions.append(question)
            answers[question.key] = " and ".join(mentions)
            rows.append({"mentions": mentions, "truth": set(truth)})
        same(chair.score(questions, answers, get("chair")).values(), scorers.chair(rows))


def test_mme():
    rng = np.random.default_rng(2)
    for _ in range(SETS):
        rows, questions, answers = [], [], {}
        for task in mme.HALLUCINATION[: rng.integers(1, 5)]:
            for image in range(rng.integers(1, 5)):
                for number, label in enumerate(("yes", "no"), start=1):
                    question = Question(f"{image}/{number}", picture(image), "?", label, task)
                    questions.append(question)
                    answers[question.key] = words(rng)
                    rows.append({"task": task, "image": image, "label": label, "text": answers[question.key]})
        expected = scorers.mme(rows)
        scores = mme.score(questions, answers, get("mme"))
        same(scores.values(), expected)
        assert ("hallucination" in scores.figures) == ("hallucination" in expected)


def test_amber_descriptions():
    rng = np.random.default_rng(3)
    names = [f"noun{i}" for i in range(9)]
    association = {name: [names[j] for j in rng.integers(0, 9, 2)] for name in names[:5]}
    lists = {"association": association, "known": frozenset(names), "safe": frozenset(names[7:]), "matching": "exact"}
    for _ in range(SETS):
        chosen = rng.permutation(5)
        truth, temptations = ([names[j] for j in part] for part in (chosen[:2], chosen[2:4]))
        nouns = [names[j] for j in rng.integers(0, 9, rng.integers(0, 7))]
        extra = {"truth": tuple(truth), "temptations": tuple(temptations), "lists": lists}
        question = Question(1, picture(1), "", None, "generative", extra)
        wrong, n, covered, tempted = scorers.amber_description(nouns, truth, temptations, association, names[7:])
        scores = amber.score([question], {question.key: ", ".join(nouns)}, get("amber/generative"))
        expected = {"CHAIR": scorers.share(wrong, n), "Cover": covered / 2, "Hal": float(wrong > 0), "Cog": tempted / 2}
        same(scores.values(), expected)


def test_amber_questions():
    rng = np.random.default_rng(4)
    texts = ["Yes", "No", "yes", "no", "No.", "maybe"]
    for _ in range(SETS):
        questions = [
            Question(i, picture(i // 2), "?", ("yes", "no")[rng.integers(2)],
                     amber.DISCRIMINATIVE[rng.integers(5)])
            for i in range(rng.integers(1, 20))
        ]  # fmt: skip
        answers = {q.key: texts[rng.integers(6)] for q in questions}
        said = [{"Yes": "yes", "No": "no"}.get(answers[q.key]) for q in questions]
        expected = scorers.yes_no_figures(said, [q.label for q in questions], "no")
        found = amber.score(questions, answers, get("amber/discriminative")).values()
        same(found, {f"discriminative: {name}": value for name, value in expected.items()})


def test_choices():
    rng = np.random.default_rng(5)
    pieces = ["A", "B", "C", "(D)", "a", "b.", "the", "dog", "E", "Answer:", "B)", "x"]
    for _ in range(SETS):
        questions = [
            Question(i, picture(i), "?", "ABCD"[rng.integers(4)], "all", {"options": tuple("ABCD")})
            for i in range(rng.integers(1, 15))
        ]
        answers = {q.key: " ".join(pieces[j] for j in rng.integers(0, 12, rng.integers(0, 4))) for q in questions}
        rows = [{"said": letter(answers[q.key], tuple("ABCD")), "label": q.label} for q in questions]
        same(choices.score(questions, answers, get("choices/any")).values(), scorers.letters(rows))


def test_mihbench_is_pope_by_kind():
    rng = np.random.default_rng(6)
    for _ in range(SETS // 5):
        questions = [
            Question(i, (*picture(i), *picture(i + 1)), "?", ("yes", "no")[rng.integers(2)], group)
            for group in mihbench.GROUPS
            for i in range(rng.integers(1, 6))
        ]
        answers = {q.key: words(rng) for q in questions}
        found = mihbench.score(questions, answers, get("mihbench")).values()
        for group in mihbench.GROUPS:
            chosen = [q for q in questions if q.group == group]
            said = [scorers.pope_parse("strict", answers[q.key], "") for q in chosen]
            expected = scorers.yes_no_figures(said, [q.label for q in chosen])
            same(found, {f"{group}: {name}": value for name, value in expected.items()})


def test_resampling_by_weights_is_resampling_by_rows():
    """A figure of weighted images equals the figure of images repeated that often."""
    rng = np.random.default_rng(7)
    questions = [Question(i, picture(i // 2), "?", ("yes", "no")[rng.integers(2)], "random") for i in range(30)]
    answers = {q.key: ("yes", "no", "maybe")[rng.integers(3)] for q in questions}
    scores = pope.score(questions, answers, get("pope"))
    for _ in range(50):
        drawn = rng.integers(0, 15, 15)
        rows = [q for image in drawn for q in questions if q.images == picture(image)]
        said = [{"maybe": None}.get(answers[q.key], answers[q.key]) for q in rows]
        expected = scorers.yes_no_figures(said, [binary.label_of(q) for q in rows])
        found = scores.values(np.bincount(drawn, minlength=15))
        same(found, {f"random: {name}": value for name, value in expected.items()})
