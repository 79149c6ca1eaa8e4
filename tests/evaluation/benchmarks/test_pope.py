"""POPE: figures counted by hand, the files people have, and files that are wrong."""

import functools
import json
import os
from pathlib import Path

import pytest

from lvlm_jax.evaluation import Data, get
from lvlm_jax.evaluation.benchmarks import pope
from lvlm_jax.evaluation.rescore import rescore
from tests.evaluation.builders import pope_folder, pope_row, read, scored, write_lines, write_pictures
from tests.refusals import refused

PROTOCOLS = ["pope/strict", "pope/lmms-eval", "pope/vcd", "pope/official", "pope/opera"]
PUBLISHED = "LVLM_PUBLISHED_POPE"  # names a folder with coco/ and LLaVA's answer file


def sample(folder):
    return Data(pope_folder(folder, dict.fromkeys(pope.SPLITS, "yynn" * 2)))


@pytest.fixture
def random(tmp_path):
    """random(labels): the questions of POPE's random split alone."""
    return lambda labels: read("pope", pope_folder(tmp_path, {"random": labels}), groups=("random",))


def test_figures_by_hand(random, tmp_path):
    texts = ["Yes", "Yes.", "No", "maybe", "No", "Yes", "no", "yes and no"]
    found, scores = scored("pope/strict", random("yyyynnnn"), texts)
    # 2 hits, 1 missed, 1 unparsed of four yes; 2 right, 1 false alarm, 1 unparsed of four no
    expected = {"accuracy": 4 / 8, "precision": 2 / 3, "recall": 2 / 4, "yes ratio": 3 / 8, "unparsed": 2 / 8}
    expected |= {"F1": 2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2)}
    assert {name: found[f"random: {name}"] for name in expected} == pytest.approx(expected)
    assert found["strict unparsed"] == 2 / 8
    assert scores.notes["unparsed"] == 2 and scores.notes["rows"] == {"random": 8}
    assert scores.correct["random", "4"] is False
    assert scores.units[0] == "COCO_val2014_000000000000.jpg" and len(scores.units) == 4
    found, _ = scored("pope", random("yn"), "No")
    assert found["random: precision"] != found["random: precision"] and found["random: F1"] == 0.0  # nan: no yes at all
    three = read("pope", pope_folder(tmp_path, {"random": "yyyy", "popular": "nn", "adversarial": "yn"}))
    found, _ = scored("pope", three, "Yes")  # the mean is over splits
    assert found["mean: accuracy"] == pytest.approx((1 + 0 + 0.5) / 3) and found["mean: yes ratio"] == 1.0


def test_the_parser_decides(random):
    questions, texts = random("yn"), ["There isn't a dog", "yes and no"]
    found = {name.split("/")[1]: scored(name, questions, texts)[0] for name in PROTOCOLS}
    accuracies = {"official": 1.0, "opera": 0.5, "vcd": 0.5, "strict": 0.0}
    assert {name: found[name]["random: accuracy"] for name in accuracies} == accuracies
    # Whatever a parser makes of them, the report says that neither answer was one.
    assert found["vcd"]["random: yes ratio"] == 0.0 and found["vcd"]["strict unparsed"] == 1.0
    # lmms-eval leaves what it does not understand out of recall.
    questions, texts = random("yyy"), ["Yes", "No", "Yes."]
    assert scored("pope/lmms-eval", questions, texts)[0]["random: recall"] == 1 / 2
    assert scored("pope/strict", questions, texts)[0]["random: recall"] == 2 / 3
    text = "Is there a dog in the image?"
    llava = text + "\nAnswer the question using a single word or phrase."
    prompts = {"opera": text, "vcd": text + " Please answer this question with one word.", "official": llava}
    asked = {name: get(f"pope/{name}").prompt(questions[0]) for name in (*prompts, "lmms-eval")}
    assert asked == prompts | {"lmms-eval": llava}


@pytest.mark.parametrize("place", [".", "aokvqa", "output/seem/aokvqa", "POPE/output/seem/aokvqa"])
def test_older_names_of_aokvqa_and_gqa(tmp_path, place):
    for split, label in (("random", "yes"), ("popular", "no"), ("adversarial", "no")):
        row = pope_row(1, "COCO_val2014_000000000001.jpg", label)
        write_lines(tmp_path / place / f"aokvqa_pope_seem_{split}.json", [row])
    assert [q.label for q in read("pope", tmp_path, source="aokvqa")] == ["yes", "no", "no"]
    refused("POPE coco random is missing: no file coco_pope_random.json or", read, "pope", tmp_path)
    # Where there is a file of the newer name, it is the one.
    write_lines(tmp_path / place / "aokvqa_pope_popular.json", [row | {"label": "yes"}])
    assert [q.label for q in read("pope", tmp_path, source="aokvqa")] == ["yes", "yes", "no"]


@pytest.mark.parametrize("source", ["coco", "aokvqa", "gqa"])
def test_sources(tmp_path, source):
    pope_folder(tmp_path / "POPE", {"random": "y", "popular": "n", "adversarial": "yn"}, source)
    groups = [q.group for q in read("pope", tmp_path, source=source)]
    assert groups == ["random", "popular", "adversarial", "adversarial"]


def test_what_is_missing_or_there_twice(tmp_path):
    folder = pope_folder(tmp_path, {"random": "yyyn"})
    refused(r"POPE coco popular is missing: no file coco_pope_popular\.json .* in '", read, "pope", folder)
    one = functools.partial(read, "pope", folder, groups=("random",))
    write_pictures(folder / "val2014", "COCO_val2014_000000000000.jpg")
    refused("1 of 2 images of POPE are missing .*COCO_val2014_000000000001.jpg", one, need_images=True)
    assert len(one()) == 4  # scores need no pictures
    pope_folder(tmp_path / "POPE", {"random": "yn"})  # two different files of one split are not chosen between
    refused("differ; name one of them", one)
    assert len(one(question_file=tmp_path / "POPE/coco/coco_pope_random.json")) == 2


def test_bad_question_files(tmp_path):
    for content, message in (
        ("", "is empty"),
        ('{"question_id": 1', "line 1 of question file .* is not JSON"),
        ("[1]", "line 1 of question file .* is a JSON int; expected an object"),
        ('{"question_id": 1, "image": "a.jpg", "text": "?"}', "has no label"),
        (json.dumps(pope_row(1, "a.jpg", "maybe")), "label is 'maybe'; expected yes or no"),
        (json.dumps(pope_row(True, "a.jpg", "no")), "expected a number or a string"),
        (f"{json.dumps(pope_row(1, 'a.jpg'))}\n{json.dumps(pope_row('1', 'b.jpg'))}",
         "line 2 .*id random 1 occurs twice"),
    ):  # fmt: skip
        (tmp_path / "coco_pope_random.json").write_text(content)
        refused(message, read, "pope", tmp_path, groups=("random",))


def test_published_answers_of_llava(tmp_path):
    """Answers of LLaVA-1.5-13B, for which its authors publish F1 of 87.1, 86.2 and 84.5, mean 85.9."""
    if PUBLISHED not in os.environ:
        pytest.skip(f"{PUBLISHED} names no folder of published answers")
    folder = Path(os.environ[PUBLISHED])
    file = folder / "llava-v1.5-13b.jsonl"
    figures = rescore(get("pope/official"), Data(folder), [str(file)], resamples=2)["figures"]
    found = [round(100 * figures[f"{split}: F1"]["value"], 1) for split in (*pope.SPLITS, "mean")]
    assert found == [87.1, 86.2, 84.5, 85.9]
    popular = [json.loads(line) for line in file.read_text().splitlines()][-3000:]
    path = write_lines(tmp_path / "popular.jsonl", [row | {"question_id": i} for i, row in enumerate(popular, 1)])
    for partial in (False, True):
        given = get("pope/official"), Data(folder), [f"random={path}"]
        refused("line 2 .*is it the file of another split", rescore, *given, partial=partial)
