"""AMBER: descriptions and questions counted by hand, "No" as the positive class, soft matching named."""

import json
import sys
import types

import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import Data, get
from lvlm_jax.evaluation.benchmarks import amber
from lvlm_jax.evaluation.rescore import rescore
from tests.evaluation.builders import ASSOCIATION, amber_folder, read, scored, write_json
from tests.refusals import refused

PROTOCOLS = ["amber/all", "amber/generative", "amber/discriminative", "amber/discriminative-strict"]


def sample(folder):
    return Data(amber_folder(folder))


def test_descriptions_by_hand(tmp_path):
    questions = read("amber/generative", amber_folder(tmp_path))
    texts = {1: "Two trees with leaves, a puppy, a cat and light.", 2: "A dog near the water."}
    found, scores = scored("amber/generative", questions, texts)
    # image 1 names tree, leaf (of tree), PUPPY (of the temptation dog), CAT; "light" is in no list of objects
    # image 2 names dog and water, which is harmless, though it belongs to the temptation lake
    expected = {"CHAIR": 2 / 6, "Cover": (1 + 1) / (2 + 1), "Hal": 1 / 2, "Cog": 2 / 3}
    assert expected.items() <= found.items() and scores.notes["matching"] == "exact"
    assert "8.7, 51.7, 39.8, 3.2" in scores.notes["exact matching"]
    # AMBER's list has "leave"; WordNet's singular of leaves is leaf, so that the official scorer passes them over.
    write_json(tmp_path / "data/relation.json", ASSOCIATION | {"tree": ["leave"], "leave": []})
    second = read("amber/generative", tmp_path)[1]
    judged, covered, _ = amber.nouns_judged(second, "A dog in the leaves, a leave.")
    assert judged == [("dog", False), ("leave", True)] and covered == {0}


def test_questions_by_hand(tmp_path):
    questions = read("amber/discriminative", amber_folder(tmp_path))
    said = {1005: "Yes", 1006: "No", 1007: "Yes", 1008: "no"}
    found, scores = scored("amber/discriminative", questions, said)
    # three should be No: one said so, one said Yes, one said "no", which is not exactly No
    together = {"accuracy": 2 / 4, "precision": 1.0, "recall": 1 / 3, "no ratio": 1 / 4}
    assert {name: found[f"discriminative: {name}"] for name in together} == together
    assert (found["existence: recall"], found["attribute: accuracy"], found["number: recall"]) == (0.0, 1.0, 1.0)
    assert found["relation: unparsed"] == 1.0 and scores.notes["unparsed"] == 1
    assert scored("amber/discriminative-strict", questions, said)[0]["discriminative: recall"] == 2 / 3
    groups = [one.group for one in read("amber/all", tmp_path)]
    assert groups == ["generative"] * 2 + ["state", "number", "existence", "relation"]
    assert [one.group for one in read("amber/all", tmp_path, groups=("relation",))] == ["relation"]


def test_soft_matching(tmp_path, monkeypatch):
    """As AMBER's scorer: nltk's nouns, capitals kept; one like an annotated noun is not hallucinated, one like a
    temptation counts for Cog."""
    alike = {("puppy", "tree"), ("kitten", "cat")}
    monkeypatch.setattr(amber, "similar_words", lambda matching: lambda a, b: (a, b) in alike or (b, a) in alike)
    monkeypatch.setattr(amber.nltk_words, "nouns", lambda text: tuple(text.split()))
    first = read("amber/generative", amber_folder(tmp_path), matching="spacy")[0]
    judged, covered, tempted = amber.nouns_judged(first, "puppy Cat kitten walk")
    assert (judged, covered, tempted) == ([("puppy", False), ("kitten", True)], {0}, {0, 1})
    notes = scored("amber/generative", [first], "puppy")[1].notes
    assert notes["matching"] == "spacy" and "exact matching" not in notes


@pytest.mark.parametrize(
    ("there", "spacy", "matching", "expected"),
    [
        (True, True, "auto", "spacy"),
        (True, False, "auto", "exact"),
        (False, True, "auto", "exact"),
        (True, True, "exact", "exact"),
        (True, False, "spacy", "run: pip install .* python -m spacy download en_core_web_lg, or choose --matching e"),
        (False, True, "spacy", "amber under --matching spacy reads words with nltk"),
        (True, True, "soft", "matching 'soft' is unknown; choose auto, exact, spacy"),
    ],
)
def test_matching_by_what_is_installed(tmp_path, monkeypatch, there, spacy, matching, expected):
    def require(protocol, instead):
        if not there:
            raise LVLMError(f"{protocol} reads words with nltk ...")

    monkeypatch.setattr(amber.nltk_words, "require", require)
    monkeypatch.setattr(amber.nltk_words, "nouns", lambda text: ())
    monkeypatch.setattr(amber.importlib.util, "find_spec", lambda name: spacy or None)
    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=lambda name: str) if spacy else None)
    monkeypatch.setattr(amber, "similar_words", amber.similar_words.__wrapped__)  # remember nothing of the stand-in
    data, protocol = Data(amber_folder(tmp_path), matching=matching), get("amber/generative")
    if expected not in amber.MATCHINGS:
        refused(expected, amber.read, data, protocol)
        return
    answers = write_json(tmp_path / "answers.json", [{"id": number, "response": ""} for number in (1, 2)])
    assert rescore(protocol, data, [str(answers)], resamples=2)["record"]["matching"] == expected


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
    path.unlink() if change is None else write_json(path, change(json.loads(path.read_text())))
    refused(message, read, "amber/all", tmp_path)
