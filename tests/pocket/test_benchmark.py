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


@pytest.mark.parametrize("name", ["pope/strict", "pope/vcd", "mme/hallucination"])
def test_right_answers_score_full_marks(folder, tmp_path, name):
    questions = read(folder, name)
    protocol = get(name)
    said = {question.key: question.label.capitalize() for question in questions}
    path = tmp_path / ("mme" if protocol.benchmark == "mme" else "answers.jsonl")
    BENCHMARKS[protocol.benchmark].answers.write(path, questions, said, protocol)
    found = rescore.rescore(protocol, Data(folder), [str(path)], resamples=20)
    figures = found["figures"]
    if protocol.benchmark == "mme":
        assert figures["hallucination"]["value"] == 800.0
    else:
        assert figures["mean: accuracy"]["value"] == 1.0
        assert figures["mean: yes ratio"]["value"] == 0.5
    assert found["record"]["questions"] == len(questions) > IMAGES


def test_saying_yes_to_everything(folder):
    questions = read(folder, "pope/strict")
    scores = BENCHMARKS["pope"].score(questions, {q.key: "Yes" for q in questions}, get("pope/strict"))
    found = scores.values()
    for split in ("random", "popular", "adversarial"):
        assert found[f"{split}: accuracy"] == found[f"{split}: precision"] == 0.5
        assert found[f"{split}: recall"] == found[f"{split}: yes ratio"] == 1.0


def test_captions(folder):
    """A caption that names exactly what is there; and the same with one more object."""
    protocol = get("chair/pocket")
    questions = read(folder, "chair/pocket")
    scenes = {q.id: scene_at("test", i) for i, q in enumerate(questions)}
    there = {number: set(scene.counts) for number, scene in scenes.items()}
    assert all(there[q.id] <= q.extra["objects"] for q in questions)
    extra = sum(len(q.extra["objects"] - there[q.id]) for q in questions)
    assert extra == 0  # the reference captions of this split name nothing that is not there
    plurals = {q.key: " and ".join(map(catalogue.plural, sorted(there[q.id]))) + "." for q in questions}
    found = BENCHMARKS["chair"].score(questions, plurals, protocol).values()
    assert (found["C_S"], found["C_I"], found["recall"], found["F1"]) == (0.0, 0.0, 1.0, 1.0)
    absent = {q.id: next(name for name in catalogue.CATEGORIES if name not in there[q.id]) for q in questions}
    more = {q.key: f"{plurals[q.key]} There is also a {absent[q.id]}." for q in questions}
    found = BENCHMARKS["chair"].score(questions, more, protocol).values()
    mentions = sum(map(len, there.values()))
    assert found["C_S"] == 1.0
    assert found["C_I"] == pytest.approx(IMAGES / (mentions + IMAGES))


def test_questions_over_several_images(folder):
    path = folder / "questions" / "multi_image.jsonl"
    questions = read(folder, "mihbench/short", question_file=path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [len(q.images) for q in questions] == [len(row["images"]) for row in rows]
    assert {q.group for q in questions} >= {"which_image", "in_all_images", "how_many_images"}
    found = BENCHMARKS["mihbench"].score(questions, {q.key: q.label for q in questions}, get("mihbench/short"))
    assert found.values()["accuracy"] == 1.0
    assert "in_all_images: F1" in found.figures and "which_image: accuracy" in found.figures


@pytest.mark.parametrize("kind", ["choice", "counting", "position", "color", "place"])
def test_single_image_questions(folder, kind):
    questions = read(folder, "mihbench/short", question_file=folder / "questions" / f"{kind}.jsonl")
    said = {q.key: f"The {q.label}." for q in questions}
    scores = BENCHMARKS["mihbench"].score(questions, said, get("mihbench/short"))
    assert scores.values()["accuracy"] == 1.0
