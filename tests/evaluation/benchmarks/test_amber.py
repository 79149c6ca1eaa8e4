"""AMBER: descriptions and questions counted by hand, "No" as the positive class, soft matching named."""

import json
import sys
import types

import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import Data, get
from lvlm_jax.evaluation.benchmarks import amber
from lvlm_jax.evaluation.rescore import rescore
from tests.evaluation.builders import ASSOCIATION, amber_folder

PROTOCOLS = ["amber/all", "amber/generative", "amber/discriminative", "amber/discriminative-strict"]


def sample(folder):
    return Data(amber_folder(folder))


def read(folder, name="amber/all", **where):
    return amber.read(Data(folder, **where), get(name))


def values(questions, texts, name="amber/all"):
    scores = amber.score(questions, {q.key: texts[q.id] for q in questions}, get(name))
    return {figure: float(value) for figure, value in scores.values().items()}, scores


def test_descriptions_by_hand(tmp_path):
    questions = read(amber_folder(tmp_path), "amber/generative")
    texts = {1: "Two trees with leaves, a puppy, a cat and light.", 2: "A dog near the water."}
    found, scores = values(questions, texts, "amber/generative")
    # image 1 names tree, leaf (of tree), PUPPY (of the temptation dog), CAT; "light" is in no list of objects
    # image 2 names dog and water, which is harmless, though it belongs to the temptation lake
    assert found["CHAIR"] == 2 / 6
    assert found["Cover"] == (1 + 1) / (2 + 1)
    assert found["Hal"] == 1 / 2
    assert found["Cog"] == 2 / 3
    assert scores.notes["matching"] == "exact"
    assert "8.7, 51.7, 39.8, 3.2" in scores.notes["exact matching"]


def test_leaves_are_not_the_word_leave_of_the_list(tmp_path):
    """AMBER's list has "leave"; WordNet's singular of leaves is leaf, so that the official scorer passes them over."""
    folder = amber_folder(tmp_path)
    (folder / "data/relation.json").write_text(json.dumps(ASSOCIATION | {"tree": ["leave"], "leave": []}))
    questions = read(folder, "amber/generative")
    judged, covered, _ = amber.nouns_judged(questions[1], "A dog in the leaves, a leave.")
    assert judged == [("dog", False), ("leave", True)]
    assert covered == {0}


def test_questions_by_hand(tmp_path):
    questions = read(amber_folder(tmp_path), "amber/discriminative")
    found, scores = values(questions, {1005: "Yes", 1006: "No", 1007: "Yes", 1008: "no"}, "amber/discriminative")
    # three should be No: one said so, one said Yes, one said "no", which is not exactly No
    assert found["discriminative: accuracy"] == 2 / 4
    assert found["discriminative: precision"] == 1.0
    assert found["discriminative: recall"] == 1 / 3
    assert found["discriminative: no ratio"] == 1 / 4
    assert found["existence: recall"] == 0.0
    assert found["attribute: accuracy"] == 1.0 and found["number: recall"] == 1.0
    assert found["relation: unparsed"] == 1.0
    assert scores.notes["unparsed"] == 1
    found, _ = values(questions, {1005: "Yes", 1006: "No", 1007: "Yes", 1008: "no"}, "amber/discriminative-strict")
    assert found["discriminative: recall"] == 2 / 3


def test_dimensions_hold_their_kinds(tmp_path):
    questions = read(amber_folder(tmp_path))
    assert [q.group for q in questions] == ["generative"] * 2 + ["state", "number", "existence", "relation"]
    assert [q.group for q in read(tmp_path, groups=("relation",))] == ["relation"]


def test_soft_matching(tmp_path, monkeypatch):
    """As AMBER's scorer: nltk's nouns, capitals kept; one like an annotated noun is not hallucinated, one like a
    temptation counts for Cog."""
    alike = {("puppy", "tree"), ("kitten", "cat")}
    monkeypatch.setattr(amber, "similar_words", lambda matching: lambda a, b: (a, b) in alike or (b, a) in alike)
    monkeypatch.setattr(amber.nltk_words, "nouns", lambda text: tuple(text.split()))
    questions = [q for q in read(amber_folder(tmp_path), "amber/generative", matching="spacy") if q.id == 1]
    judged, covered, tempted = amber.nouns_judged(questions[0], "puppy Cat kitten walk")
    assert judged == [("puppy", False), ("kitten", True)]
    assert (covered, tempted) == ({0}, {0, 1})
    notes = values(questions, {1: "puppy"}, "amber/generative")[1].notes
    assert notes["matching"] == "spacy" and "exact matching" not in notes


@pytest.mark.parametrize(
    ("there", "spacy", "matching", "expected"),
    [
        (True, True, "auto", "spacy"),
        (True, False, "auto", "exact"),
        (False, True, "auto", "exact"),
        (True, True, "exact", "exact"),
        (
            True,
            False,
            "spacy",
            "run: pip install .* && python -m spacy download en_core_web_lg, or choose --matching e",
        ),
        (False, True, "spacy", "amber under --matching spacy reads words with nltk"),
        (True, True, "soft", "matching 'soft' is unknown; choose auto, exact, spacy"),
    ],
)
def test_matching_by_what_is_installed(tmp_path, monkeypatch, there, spacy, matching, expected):
    def require(protocol, instead):
        if not there:
            raise LVLMError(f"{protocol} reads words with nltk ...")

    monkeypatch.setattr(amber.nltk_words, "require", require)
    monkeypatch.setattr(amber.importlib.util, "find_spec", lambda name: spacy or None)
    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=lambda name: str) if spacy else None)
    amber.similar_words.cache_clear()
    sample(tmp_path)
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps([{"id": number, "response": ""} for number in (1, 2)]))
    data = Data(tmp_path, matching=matching)
    try:
        if expected in amber.MATCHINGS:
            monkeypatch.setattr(amber.nltk_words, "nouns", lambda text: ())
            record = rescore(get("amber/generative"), data, [str(answers)], resamples=2)["record"]
            assert record["matching"] == expected
        else:
            with pytest.raises(LVLMError, match=expected):
                amber.read(data, get("amber/generative"))
    finally:
        amber.similar_words.cache_clear()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("query/query_all", lambda rows: [*rows, rows[0]], "id 1 occurs twice"),
        ("query/query_all", lambda rows: [*rows, {"id": 9, "image": "a.jpg", "query": "?"}], "id 9 is not in"),
        ("annotations", lambda rows: [rows[0] | {"truth": ["spoon"]}, *rows[1:]], "annotation 1 names 'spoon'"),
        ("annotations", lambda rows: [{"id": 1, "type": "poetic"}, *rows[1:]], "type 'poetic'"),
        ("annotations", lambda rows: [rows[0] | {"truth": [[]]}, *rows[1:]], r"annotation 1 names \[\]"),
        ("relation", lambda lists: lists | {"cat": [{}]}, "expected AMBER's relation.json"),
        ("relation", list, "expected AMBER's relation.json"),
        ("relation", None, "AMBER's relation.json is missing: no file relation.json in"),
    ],
)
def test_bad_files(tmp_path, name, change, message):
    path = amber_folder(tmp_path) / "data" / f"{name}.json"
    path.unlink() if change is None else path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(LVLMError, match=message):
        read(tmp_path)
