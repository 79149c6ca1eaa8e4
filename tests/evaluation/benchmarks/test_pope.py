"""POPE: figures counted by hand, the files people have, and files that are wrong."""

import json
import os
from pathlib import Path

import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import Data, get
from lvlm_jax.evaluation.benchmarks import pope
from lvlm_jax.evaluation.rescore import rescore
from tests.evaluation.builders import pope_folder, pope_row, write_lines

PROTOCOLS = ["pope/strict", "pope/lmms-eval", "pope/vcd", "pope/official", "pope/opera"]

PUBLISHED = "LVLM_PUBLISHED_POPE"  # names a folder with coco/ and LLaVA's answer file


def sample(folder):
    return Data(pope_folder(folder, dict.fromkeys(pope.SPLITS, "yynn" * 2)))


def read(folder, name="pope/strict", **where):
    return pope.read(Data(folder, **where), get(name))


def values(questions, texts, name="pope/strict"):
    answers = {question.key: text for question, text in zip(questions, texts, strict=True)}
    scores = pope.score(questions, answers, get(name))
    return {figure: float(value) for figure, value in scores.values().items()}, scores


def test_figures_by_hand(tmp_path):
    questions = read(pope_folder(tmp_path, {"random": "yyyynnnn"}), groups=("random",))
    texts = ["Yes", "Yes.", "No", "maybe", "No", "Yes", "no", "yes and no"]
    found, scores = values(questions, texts)
    # 2 hits, 1 missed, 1 unparsed of four yes; 2 right, 1 false alarm, 1 unparsed of four no
    assert found["random: accuracy"] == 4 / 8
    assert found["random: precision"] == 2 / 3
    assert found["random: recall"] == 2 / 4
    assert found["random: F1"] == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert found["random: yes ratio"] == 3 / 8
    assert found["random: unparsed"] == found["strict unparsed"] == 2 / 8
    assert scores.notes["unparsed"] == 2
    assert scores.notes["rows"] == {"random": 8}
    assert scores.correct["random", "4"] is False
    assert scores.units[0] == "COCO_val2014_000000000000.jpg" and len(scores.units) == 4


def test_the_parser_decides(tmp_path):
    questions = read(pope_folder(tmp_path, {"random": "yn"}), groups=("random",))
    texts = ["There isn't a dog", "yes and no"]
    assert values(questions, texts, "pope/official")[0]["random: accuracy"] == 1.0
    assert values(questions, texts, "pope/opera")[0]["random: accuracy"] == 0.5
    found, _ = values(questions, texts, "pope/vcd")
    assert (found["random: accuracy"], found["random: yes ratio"]) == (0.5, 0.0)
    assert values(questions, texts)[0]["random: accuracy"] == 0.0
    # Whatever a parser makes of them, the report says that neither answer was one.
    assert found["strict unparsed"] == 1.0


def test_lmms_eval_leaves_what_it_does_not_understand_out_of_recall(tmp_path):
    questions = read(pope_folder(tmp_path, {"random": "yyy"}), groups=("random",))
    texts = ["Yes", "No", "Yes."]
    assert values(questions, texts, "pope/lmms-eval")[0]["random: recall"] == 1 / 2
    assert values(questions, texts)[0]["random: recall"] == 2 / 3


@pytest.mark.parametrize("place", [".", "aokvqa", "output/seem/aokvqa", "POPE/output/seem/aokvqa"])
def test_older_names_of_aokvqa_and_gqa(tmp_path, place):
    for split, label in (("random", "yes"), ("popular", "no"), ("adversarial", "no")):
        row = pope_row(1, "COCO_val2014_000000000001.jpg", label)
        write_lines(tmp_path / place / f"aokvqa_pope_seem_{split}.json", [row])
    assert [q.label for q in read(tmp_path, source="aokvqa")] == ["yes", "no", "no"]
    with pytest.raises(LVLMError, match="POPE coco random is missing: no file coco_pope_random.json or"):
        read(tmp_path)
    # Where there is a file of the newer name, it is the one.
    write_lines(tmp_path / place / "aokvqa_pope_popular.json", [row | {"label": "yes"}])
    assert [q.label for q in read(tmp_path, source="aokvqa")] == ["yes", "yes", "no"]


def test_mean_is_over_splits(tmp_path):
    folder = pope_folder(tmp_path, {"random": "yyyy", "popular": "nn", "adversarial": "yn"})
    questions = read(folder)
    found, _ = values(questions, ["Yes"] * 8)
    assert found["mean: accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["mean: yes ratio"] == 1.0


@pytest.mark.parametrize("source", ["coco", "aokvqa", "gqa"])
def test_sources(tmp_path, source):
    pope_folder(tmp_path / "POPE", {"random": "y", "popular": "n", "adversarial": "yn"}, source)
    groups = [q.group for q in read(tmp_path, source=source)]
    assert groups == ["random", "popular", "adversarial", "adversarial"]


def test_no_yes_at_all_leaves_precision_undefined(tmp_path):
    questions = read(pope_folder(tmp_path, {"random": "yn"}), groups=("random",))
    found, _ = values(questions, ["No", "No"])
    assert found["random: precision"] != found["random: precision"]  # nan
    assert found["random: F1"] == 0.0


def test_two_different_files_of_one_split_are_not_chosen_between(tmp_path):
    pope_folder(tmp_path / "POPE", {"random": "yyyn"})
    pope_folder(tmp_path, {"random": "yn"})
    with pytest.raises(LVLMError, match="differ; name the one that is meant"):
        read(tmp_path, groups=("random",))
    chosen = read(tmp_path, groups=("random",), question_file=tmp_path / "coco/coco_pope_random.json")
    assert len(chosen) == 2


def test_missing_split_names_the_file_and_the_folder(tmp_path):
    folder = pope_folder(tmp_path, {"random": "y"})
    message = r"POPE coco popular is missing: no file coco_pope_popular\.json .* in '"
    with pytest.raises(LVLMError, match=message):
        read(folder)


def test_missing_image(tmp_path):
    folder = pope_folder(tmp_path, {"random": "yyyy"})
    (folder / "val2014").mkdir()
    (folder / "val2014" / "COCO_val2014_000000000000.jpg").write_bytes(b"x")
    with pytest.raises(LVLMError, match="1 of 2 images of POPE are missing .*COCO_val2014_000000000001.jpg"):
        pope.read(Data(folder, groups=("random",)), get("pope/strict"), need_images=True)
    assert len(read(folder, groups=("random",))) == 4  # scores need no pictures


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"question_id": 1', "line 1 of question file .* is not JSON"),
        ("[1]", "line 1 of question file .* is a JSON int; expected an object"),
        ('{"question_id": 1, "image": "a.jpg", "text": "?"}', "has no label"),
        (json.dumps(pope_row(1, "a.jpg", "maybe")), "label is 'maybe'; expected yes or no"),
        (json.dumps(pope_row(True, "a.jpg", "no")), "expected a number or a string"),
    ],
)
def test_bad_question_files(tmp_path, content, message):
    (tmp_path / "coco_pope_random.json").write_text(content)
    with pytest.raises(LVLMError, match=message):
        read(tmp_path, groups=("random",))


def test_duplicate_ids(tmp_path):
    write_lines(tmp_path / "coco_pope_random.json", [pope_row(1, "a.jpg"), pope_row("1", "b.jpg")])
    with pytest.raises(LVLMError, match="line 2 .*id random 1 occurs twice"):
        read(tmp_path, groups=("random",))


def test_prompts_of_the_protocols(tmp_path):
    question = read(pope_folder(tmp_path, {"random": "y"}), groups=("random",))[0]
    text = "Is there a dog in the image?"
    assert get("pope/opera").prompt(question) == text
    assert get("pope/vcd").prompt(question) == text + " Please answer this question with one word."
    llava = text + "\nAnswer the question using a single word or phrase."
    assert get("pope/official").prompt(question) == get("pope/lmms-eval").prompt(question) == llava


def test_published_answers_of_llava(tmp_path):
    """Of LLaVA-1.5-13B; its authors publish F1 of 87.1, 86.2 and 84.5, mean 85.9."""
    if PUBLISHED not in os.environ:
        pytest.skip(f"{PUBLISHED} names no folder of published answers")
    folder = Path(os.environ[PUBLISHED])
    file = folder / "llava-v1.5-13b.jsonl"
    figures = rescore(get("pope/official"), Data(folder), [str(file)], resamples=2)["figures"]
    found = [round(100 * figures[f"{split}: F1"]["value"], 1) for split in (*pope.SPLITS, "mean")]
    assert found == [87.1, 86.2, 84.5, 85.9]
    popular = [json.loads(line) for line in file.read_text().splitlines()][-3000:]
    for number, row in enumerate(popular, start=1):
        row["question_id"] = number
    path = write_lines(tmp_path / "popular.jsonl", popular)
    for partial in (False, True):
        with pytest.raises(LVLMError, match="line 2 .*is it the file of another split"):
            rescore(get("pope/official"), Data(folder), [f"random={path}"], partial=partial)
