"""AMBER: descriptions and questions counted by hand, "No" as the positive class, soft matching named."""

import importlib.util
import json

import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import Data, get
from lvlm_jax.evaluation.benchmarks import amber
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
    """With vectors a noun like an annotated one is not hallucinated, and one like a temptation counts for Cog."""
    alike = {("puppy", "tree"), ("kitten", "cat")}
    monkeypatch.setattr(amber, "similar_words", lambda matching: lambda a, b: (a, b) in alike or (b, a) in alike)
    questions = [q for q in read(amber_folder(tmp_path), "amber/generative") if q.id == 1]
    judged, covered, tempted = amber.nouns_judged(questions[0], "A puppy and a kitten.")
    assert judged == [("puppy", False), ("kitten", True)]
    assert (covered, tempted) == ({0}, {0, 1})


@pytest.mark.skipif(importlib.util.find_spec("spacy") is not None, reason="spaCy is installed")
def test_soft_matching_needs_spacy(tmp_path):
    with pytest.raises(LVLMError, match="needs the packages spacy and en_core_web_lg"):
        read(amber_folder(tmp_path), matching="spacy")


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
