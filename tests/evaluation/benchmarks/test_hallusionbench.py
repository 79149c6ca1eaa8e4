"""HallusionBench: figures counted by hand, both spellings of file names, answers as the official scorer takes them."""

import json

import pytest

from lvlm_jax.evaluation import Data, answers, get
from lvlm_jax.evaluation.benchmarks import hallusionbench
from tests.evaluation.builders import read, scored, write_json, write_pictures
from tests.refusals import refused

PROTOCOLS = ["hallusionbench/strict"]
PROTOCOL = get("hallusionbench")


def row(category, figure, number, answer, folder="./hallusion_bench/", **more):
    """A question of set 3 of its category."""
    kind = {"VD": "illusion", "VS": "ocr"}[category]
    without = category == "VS" and figure == 0
    return {
        "category": category, "subcategory": kind, "visual_input": str(int(not without)), "set_id": "3",
        "figure_id": str(figure), "sample_note": "note", "question_id": str(number), "question": f"Is it {number}?",
        "gt_answer_details": "It is.", "gt_answer": str(int(answer)),
        "filename": None if without else f"{folder}{category}/{kind}/3_{figure}.png",
    } | more  # fmt: skip


ROWS = [
    row("VD", 0, 0, True), row("VD", 0, 1, False), row("VD", 1, 0, False), row("VD", 1, 1, True),
    row("VS", 0, 0, True), row("VS", 0, 1, True), row("VS", 1, 0, False, folder="./"),  # as the newer file writes it
]  # fmt: skip


def sample(folder):
    return Data(write_json(folder / "HallusionBench.json", ROWS).parent)


@pytest.fixture
def questions(tmp_path):
    return hallusionbench.read(sample(tmp_path), PROTOCOL)


def test_questions_and_pictures(tmp_path, questions):
    write_pictures(tmp_path / "hallusion_bench", "VD/illusion/3_0.png", "VD/illusion/3_1.png", "VS/ocr/3_1.png")
    questions = read("hallusionbench", tmp_path, need_images=True)
    assert questions[3].key == ("VD", "illusion/3_1/1") and questions[3].label == "yes"
    assert questions[3].images == (tmp_path / "hallusion_bench/VD/illusion/3_1.png",)
    assert questions[6].image_names == ("VS/ocr/3_1.png",) and questions[6].images[0].is_file()
    assert [question.images for question in questions[4:6]] == [(), ()]
    assert len(read("hallusionbench", tmp_path, groups=("VS",))) == 3
    (tmp_path / "hallusion_bench/VS/ocr/3_1.png").unlink()
    missing = "1 of 3 images of HallusionBench are missing .*VS/ocr/3_1.png"
    refused(missing, read, "hallusionbench", tmp_path, need_images=True)


def test_figures_by_hand(questions):
    said = ["Yes", "No", "no", "No, it is not.", "Perhaps", "Yes", "No"]
    found, scores = scored("hallusionbench", questions, said)
    # VD: right, right | right, wrong. VS: unparsed, right without a figure, and right.
    expected = {"aAcc": 5 / 7, "VD: aAcc": 3 / 4, "VS: aAcc": 2 / 3}
    # Pairs: VD 0 right twice, VD 1 once of twice; VS 0 once of twice, VS 1 has one question alone.
    expected |= {"qAcc": 2 / 4, "VD: qAcc": 1 / 2, "VS: qAcc": 1 / 2}
    # Figures: VD 0 whole, VD 1 not, VS 1 whole; VS 0 is no figure.
    expected |= {"fAcc": 2 / 3, "VD: fAcc": 1 / 2, "VS: fAcc": 1.0, "unparsed": 1 / 7}
    assert expected.items() <= found.items() and scores.notes["unparsed"] == 1
    assert scores.units == ("VD/illusion/3", "VS/ocr/3")
    assert scores.sizes()["qAcc"] == 4 and scores.sizes()["fAcc"] == 3
    assert PROTOCOL.prompt(questions[0]) == "Is it 0?\nAnswer the question using a single word or phrase."


def test_answers_as_the_official_scorer_takes_them(questions, tmp_path):
    form = hallusionbench.BENCHMARK.answers
    said = {question.key: "Yes" for question in questions}
    (path,) = form.write(tmp_path / form.name, questions, said, PROTOCOL)
    written = [row | {"model_prediction": "Yes"} for row in ROWS]
    assert json.loads(path.read_text()) == written
    # The published sample of results has no file names; lines of our own form are read too.
    without = [{name: value for name, value in row.items() if name != "filename"} for row in written]
    ours = [{"question_id": one.id, "text": "Yes", "category": one.group} for one in questions]
    for rows in (without, ours):
        assert answers.match(questions, form.read(write_json(path, rows))) == said


def test_bad_files(tmp_path):
    refused("no file HallusionBench.json in", read, "hallusionbench", tmp_path)
    refused("no category 'VR'; there are VD, VS", read, "hallusionbench", tmp_path, groups=("VR",))
    for wrong, message in (
        (row("VD", 0, 0, True), "id VD illusion/3_0/0 occurs twice"),
        (row("VD", 2, 0, True, gt_answer="2"), "category 'VD' and gt_answer '2'; expected VD or VS, and 0 or 1"),
        (row("VD", 2, 0, True) | {"category": "VQ"}, "has category 'VQ'"),
        (row("VD", 2, 0, True, filename=None), "filename is None; expected a string"),
        ({"category": "VD"}, "has no subcategory"),
    ):
        write_json(tmp_path / "HallusionBench.json", [*ROWS, wrong])
        refused(message, read, "hallusionbench", tmp_path)
