"""The pocket world's folders go through the same readers and scorers as the real benchmarks."""

import json

import pytest

from lvlm_jax.evaluation import BENCHMARKS, Data, get, rescore
from lvlm_jax.pocket import catalogue
from lvlm_jax.pocket.scenes import scene_at
from lvlm_jax.pocket.splits import write_split

IMAGES = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pocket") / "split"
    write_split(folder, "test", IMAGES)
    return folder


def read(folder, name, **where):
    protocol = get(name)
    return BENCHMARKS[protocol.benchmark].read(Data(folder, **where), protocol, need_images=True)


def scored(name, questions, said):
    """The figures of answers, one for each question."""
    protocol = get(name)
    return BENCHMARKS[protocol.benchmark].score(questions, {q.key: said(q) for q in questions}, protocol).values()


@pytest.mark.parametrize("name", ["pope/strict", "pope/vcd", "mme/hallucination"])
def test_right_answers_score_full_marks(folder, tmp_path, name):
    questions, protocol = read(folder, name), get(name)
    said = {question.key: question.label.capitalize() for question in questions}
    path = tmp_path / ("mme" if protocol.benchmark == "mme" else "answers.jsonl")
    BENCHMARKS[protocol.benchmark].answers.write(path, questions, said, protocol)
    found = rescore.rescore(protocol, Data(folder), [str(path)], resamples=20)
    full = {"hallucination": 800.0} if path.stem == "mme" else {"mean: accuracy": 1.0, "mean: yes ratio": 0.5}
    assert {figure: found["figures"][figure]["value"] for figure in full} == full
    assert found["record"]["questions"] == len(questions) > IMAGES


def test_saying_yes_to_everything(folder):
    found = scored("pope/strict", read(folder, "pope/strict"), lambda question: "Yes")
    for split in ("random", "popular", "adversarial"):
        assert found[f"{split}: accuracy"] == found[f"{split}: precision"] == 0.5
        assert found[f"{split}: recall"] == found[f"{split}: yes ratio"] == 1.0


def test_captions(folder):
    """A caption that names exactly what is there; and the same with one more object."""
    questions = read(folder, "chair/pocket")
    there = {q.id: set(scene_at("test", index).counts) for index, q in enumerate(questions)}
    # The reference captions of this split name nothing that is not there.
    assert all(there[q.id] == set(q.extra["objects"]) for q in questions)
    true = {q.id: " and ".join(map(catalogue.plural, sorted(there[q.id]))) + "." for q in questions}
    found = scored("chair/pocket", questions, lambda question: true[question.id])
    assert (found["C_S"], found["C_I"], found["recall"], found["F1"]) == (0.0, 0.0, 1.0, 1.0)
    absent = {
        number: next(name for name in catalogue.CATEGORIES if name not in names) for number, names in there.items()
    }
    found = scored("chair/pocket", questions, lambda q: f"{true[q.id]} There is also a {absent[q.id]}.")
    assert found["C_S"] == 1.0
    assert found["C_I"] == pytest.approx(IMAGES / (sum(map(len, there.values())) + IMAGES))


@pytest.mark.parametrize("kind", ["multi_image", "choice", "counting", "position", "color", "place"])
def test_further_questions(folder, kind):
    path = folder / "questions" / f"{kind}.jsonl"
    questions = read(folder, "mihbench/short", question_file=path)
    said = "{}" if kind == "multi_image" else "The {}."
    found = scored("mihbench/short", questions, lambda question: said.format(question.label))
    assert found["accuracy"] == 1.0
    if kind == "multi_image":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [len(q.images) for q in questions] == [len(row["images"]) for row in rows]
        assert {q.group for q in questions} >= {"which_image", "in_all_images", "how_many_images"}
        assert "in_all_images: F1" in found and "which_image: accuracy" in found
