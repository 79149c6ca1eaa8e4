"""A thousand random answer sets, scored by our scorers and by the simple ones of tests/reference/scorers.py."""

import math

import numpy as np
import pytest

from lvlm_jax.evaluation.benchmarks import amber, mihbench, mme, pope
from lvlm_jax.evaluation.chair_words import Lexicon
from lvlm_jax.evaluation.parsers import letter
from lvlm_jax.evaluation.question import Question
from tests.evaluation.builders import scored
from tests.reference import scorers

SETS = 1000
PIECES = ["Yes", "No", "yes", "no", "NO", "YES", "not", "Not", "isn't", "maybe", "know", "yesterday", "a dog", "none",
          "Yes.", "No,", "no.", ",", ".", ". ", " ", "\n", "", "-no-", "yes/no", "_no"]  # fmt: skip


def words(rng):
    """Something like an answer: up to four pieces, joined by blanks or by nothing."""
    joined = " " if rng.random() < 0.7 else ""
    return joined.join(PIECES[i] for i in rng.integers(0, len(PIECES), rng.integers(0, 5)))


def same(found, expected, prefix=""):
    """Every expected figure is found; None is nan."""
    for name, value in expected.items():
        number = found[prefix + name]
        assert math.isnan(number) if value is None else number == pytest.approx(value, abs=1e-12), name


def picture(i):
    return (f"image{i}".encode(),)


def yes_or_no(rng):
    return ("yes", "no")[rng.integers(2)]


@pytest.mark.parametrize("parser", ["strict", "official", "opera", "vcd", "lmms-eval"])
def test_pope(parser):
    rng = np.random.default_rng(0)
    for _ in range(SETS // 5):
        splits = [split for split in pope.SPLITS[: rng.integers(1, 4)] for _ in range(rng.integers(1, 12))]
        rows = [{"split": split, "text": words(rng), "label": yes_or_no(rng)} for split in splits]
        questions = [Question(i, picture(i // 3), "?", row["label"], row["split"]) for i, row in enumerate(rows)]
        found, scores = scored(f"pope/{parser}", questions, [row["text"] for row in rows])
        expected = scorers.pope(rows, parser)
        assert set(found) == set(expected)
        same(found, expected)
        rights = [scorers.pope_parse(parser, row["text"], row["label"]) == row["label"] for row in rows]
        assert list(scores.correct.values()) == rights


def test_chair():
    rng = np.random.default_rng(1)
    names = [f"thing{i}" for i in range(6)]
    lexicon = Lexicon({name: name for name in names}, {}, "test")
    for _ in range(SETS):
        questions, rows = [], []
        for i in range(rng.integers(1, 6)):
            truth = frozenset(name for name in names if rng.random() < 0.3)
            questions.append(Question(i, picture(i), "", None, "captions", {"objects": truth, "lexicon": lexicon}))
            mentions = [names[j] for j in rng.integers(0, 6, rng.integers(0, 5))]
            rows.append({"mentions": mentions, "truth": set(truth)})
        found, _ = scored("chair", questions, [" and ".join(row["mentions"]) for row in rows])
        same(found, scorers.chair(rows))


def test_mme():
    rng = np.random.default_rng(2)
    for _ in range(SETS):
        tasks = mme.HALLUCINATION[: rng.integers(1, 5)]
        images = [(task, image) for task in tasks for image in range(rng.integers(1, 5))]
        asked = [(task, image, label) for task, image in images for label in ("yes", "no")]
        rows = [{"task": task, "image": image, "label": label, "text": words(rng)} for task, image, label in asked]
        questions = [
            Question(f"{row['image']}/{1 + i % 2}", picture(row["image"]), "?", row["label"], row["task"])
            for i, row in enumerate(rows)
        ]
        found, _ = scored("mme", questions, [row["text"] for row in rows])
        expected = scorers.mme(rows)
        same(found, expected)
        assert ("hallucination" in found) == ("hallucination" in expected)


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
        expected = {"CHAIR": scorers.share(wrong, n), "Cover": covered / 2, "Hal": float(wrong > 0), "Cog": tempted / 2}
        same(scored("amber/generative", [question], ", ".join(nouns))[0], expected)


def test_amber_questions():
    rng = np.random.default_rng(4)
    texts = ["Yes", "No", "yes", "no", "No.", "maybe"]
    for _ in range(SETS):
        count = range(rng.integers(1, 20))
        kinds = [(yes_or_no(rng), amber.DISCRIMINATIVE[rng.integers(5)]) for _ in count]
        questions = [Question(i, picture(i // 2), "?", *kind) for i, kind in enumerate(kinds)]
        answers = [texts[rng.integers(6)] for _ in count]
        said = [{"Yes": "yes", "No": "no"}.get(text) for text in answers]
        expected = scorers.yes_no_figures(said, [q.label for q in questions], "no")
        same(scored("amber/discriminative", questions, answers)[0], expected, "discriminative: ")


def test_choices():
    rng = np.random.default_rng(5)
    pieces = ["A", "B", "C", "(D)", "a", "b.", "the", "dog", "E", "Answer:", "B)", "x"]
    options = tuple("ABCD")
    for _ in range(SETS):
        labels = [options[rng.integers(4)] for _ in range(rng.integers(1, 15))]
        questions = [Question(i, picture(i), "?", one, "all", {"options": options}) for i, one in enumerate(labels)]
        answers = [" ".join(pieces[j] for j in rng.integers(0, 12, rng.integers(0, 4))) for _ in labels]
        rows = [{"said": letter(text, options), "label": one} for text, one in zip(answers, labels, strict=True)]
        same(scored("choices/any", questions, answers)[0], scorers.letters(rows))


def test_mihbench_is_pope_by_kind():
    rng = np.random.default_rng(6)
    for _ in range(SETS // 5):
        kinds = [(i, group) for group in mihbench.GROUPS for i in range(rng.integers(1, 6))]
        questions = [Question(i, (*picture(i), *picture(i + 1)), "?", yes_or_no(rng), group) for i, group in kinds]
        answers = {q.key: words(rng) for q in questions}
        found, _ = scored("mihbench", questions, answers)
        for group in mihbench.GROUPS:
            chosen = [q for q in questions if q.group == group]
            said = [scorers.pope_parse("strict", answers[q.key], "") for q in chosen]
            same(found, scorers.yes_no_figures(said, [q.label for q in chosen]), f"{group}: ")


def test_resampling_by_weights_is_resampling_by_rows():
    """A figure of weighted images equals the figure of images repeated that often."""
    rng = np.random.default_rng(7)
    questions = [Question(i, picture(i // 2), "?", yes_or_no(rng), "random") for i in range(30)]
    answers = {q.key: ("yes", "no", "maybe")[rng.integers(3)] for q in questions}
    scores = scored("pope", questions, answers)[1]
    for _ in range(50):
        drawn = rng.integers(0, 15, 15)
        rows = [q for image in drawn for q in questions if q.images == picture(image)]
        said = [{"maybe": None}.get(answers[q.key], answers[q.key]) for q in rows]
        found = scores.values(np.bincount(drawn, minlength=15))
        same(found, scorers.yes_no_figures(said, [q.label for q in rows]), "random: ")
