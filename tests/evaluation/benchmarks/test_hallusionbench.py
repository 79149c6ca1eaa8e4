"""HallusionBench: figures counted by hand, both spellings of file names, answers as the official scorer takes them."""

import json

import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import Data, answers, get
from lvlm_jax.evaluation.benchmarks import hallusionbench
from tests.evaluation.builders import write_json

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
    row("VD", 0, 0, True),
    row("VD", 0, 1, False),
    row("VD", 1, 0, False),
    row("VD", 1, 1, True),
    row("VS", 0, 0, True),
    row("VS", 0, 1, True),
    row("VS", 1, 0, False, folder="./"),  # as the newer file writes it
]


def sample(folder):
    write_json(folder / "HallusionBench.json", ROWS)
    return Data(folder)


@pytest.fixture
def questions(tmp_path):
    return hallusionbench.read(sample(tmp_path), PROTOCOL)


def test_questions_and_pictures(tmp_path):
    for name in ("VD/illusion/3_0.png", "VD/illusion/3_1.png", "VS/ocr/3_1.png"):
        path = tmp_path / "hallusion_bench" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture")
    questions = hallusionbench.read(sample(tmp_path), PROTOCOL, need_images=True)
    assert questions[3].key == ("VD", "illusion/3_1/1") and questions[3].label == "yes"
    assert questions[3].images == (tmp_path / "hallusion_bench/VD/illusion/3_1.png",)
    assert questions[6].image_names == ("VS/ocr/3_1.png",) and questions[6].images[0].is_file()
    assert [question.images for question in questions[4:6]] == [(), ()]
    assert len(hallusionbench.read(Data(tmp_path, groups=("VS",)), PROTOCOL)) == 3
    (tmp_path / "hallusion_bench/VS/ocr/3_1.png").unlink()
    with pytest.raises(LVLMError, match="1 of 3 images of HallusionBench are missing .*VS/ocr/3_1.png"):
        hallusionbench.read(Data(tmp_path), PROTOCOL, need_images=True)


def test_figures_by_hand(questions):
    said = ["Yes", "No", "no", "No, it is not.", "Perhaps", "Yes", "No"]
    texts = {question.key: text for question, text in zip(questions, said, strict=True)}
    scores = hallusionbench.score(questions, texts, PROTOCOL)
    found = {name: float(value) for name, value in scores.values().items()}
    # VD: right, right | right, wrong. VS: unparsed, right without a figure, and right.
    assert found["aAcc"] == 5 / 7 and found["VD: aAcc"] == 3 / 4 and found["VS: aAcc"] == 2 / 3
    # Pairs: VD 0 right twice, VD 1 once of twice; VS 0 once of twice, VS 1 has one question alone.
    assert found["qAcc"] == 2 / 4 and found["VD: qAcc"] == found["VS: qAcc"] == 1 / 2
    # Figures: VD 0 whole, VD 1 not, VS 1 whole; VS 0 is no figure.
    assert found["fAcc"] == 2 / 3 and found["VD: fAcc"] == 1 / 2 and found["VS: fAcc"] == 1.0
    assert found["unparsed"] == 1 / 7 and scores.notes["unparsed"] == 1
    assert scores.units == ("VD/illusion/3", "VS/ocr/3")
    assert scores.sizes()["qAcc"] == 4 and scores.sizes()["fAcc"] == 3
    assert PROTOCOL.prompt(questions[0]) == "Is it 0?\nAnswer the question using a single word or phrase."


def test_answers_as_the_official_scorer_takes_them(questions, tmp_path):
    form = hallusionbench.BENCHMARK.answers
    said = {question.key: "Yes" for question in questions}
    (path,) = form.write(tmp_path / form.name, questions, said, PROTOCOL)
    assert json.loads(path.read_text()) == [row | {"model_prediction": "Yes"} for row in ROWS]
    # The published sample of results has no file names; lines of our own form are read too.
    write_json(
        path, [{name: row[name] for name in row if name != "filename"} | {"model_prediction": "Yes"} for row in ROWS]
    )
    assert answers.match(questions, form.read(path)) == said
    write_json(path, [{"question_id": one.id, "text": "Yes", "category": one.group} for one in questions])
    assert answers.match(questions, form.read(path)) == said


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (row("VD", 0, 0, True), "id VD illusion/3_0/0 occurs twice"),
        (row("VD", 2, 0, True, gt_answer="2"), "category 'VD' and gt_answer '2'; expected VD or VS, and 0 or 1"),
        (row("VD", 2, 0, True) | {"category": "VQ"}, "has category 'VQ'"),
        (row("VD", 2, 0, True, filename=None), "filename is None; expected a string"),
        ({"category": "VD"}, "has no subcategory"),
    ],
)
def test_bad_files(tmp_path, wrong, message):
    write_json(tmp_path / "HallusionBench.json", [*ROWS, wrong])
    with pytest.raises(LVLMError, match=message):
        hallusionbench.read(Data(tmp_path), PROTOCOL)


def test_what_is_not_there(tmp_path):
    with pytest.raises(LVLMError, match="no file HallusionBench.json in"):
        hallusionbench.read(Data(tmp_path), PROTOCOL)
    with pytest.raises(LVLMError, match="no category 'VR'; there are VD, VS"):
        hallusionbench.read(Data(tmp_path, groups=("VR",)), PROTOCOL)
