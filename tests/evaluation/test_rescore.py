"""`tools/evaluate.py --rescore`: from files to scores, and one clear line for every fault."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lvlm_jax.cli import evaluate
from tests.evaluation.builders import coco_folder, mme_folder, pope_answers, pope_folder, write_json, write_lines
from tests.refusals import refused

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("random", "popular", "adversarial")


def run(*words):
    return evaluate.main([str(word) for word in words])


def random(folder, path):
    """Words that score answers to POPE's random split."""
    return ["--protocol", "pope", "--data", folder, "--group", "random", "--rescore", path, "--out", "out"]


def scores(folder="out"):
    return json.loads((Path(folder) / "scores.json").read_text())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return pope_folder(tmp_path / "data", dict.fromkeys(SPLITS, "yynn" * 5))


def test_three_splits(folder, capsys):
    said = ["Yes", "No", "No", "maybe"] * 5
    words = [f"{split}={pope_answers(Path(f'{split}.jsonl'), said)}" for split in SPLITS]
    assert run("--protocol", "pope/strict", "--data", folder, "--rescore", *words, "--model-name", "llava") == 0
    out = capsys.readouterr().out
    assert "mean: accuracy" in out and "50.0" in out and "protocol pope/strict (parser strict)" in out
    found = scores("runs/pope-strict")
    accuracy = found["figures"]["mean: accuracy"]
    assert accuracy["value"] == 0.5 and accuracy["n"] == 60 and accuracy["unit"] == "share"
    assert accuracy["interval"][0] <= 0.5 <= accuracy["interval"][1]
    record = found["record"]
    assert record["protocol"]["name"] == "pope/strict" and record["model"]["name"] == "llava"
    assert set(record["files"]) == set(SPLITS)
    assert record["bootstrap"] == {"resamples": 2000, "seed": 0, "level": 0.95, "over": "images"}
    assert [entry["name"] for entry in record["answers"]] == [f"{split}.jsonl" for split in SPLITS]
    assert found["notes"]["unparsed"] == 15
    assert len(found["correct"]) == 60 and len(found["per_image"]["images"]) == 10


def test_against_another_run(folder, capsys):
    ours = pope_answers(Path("ours.jsonl"), ["Yes", "Yes", "No", "No"] * 5)
    greedy = pope_answers(Path("greedy.jsonl"), ["Yes", "No", "No", "No"] * 5)
    run(*random(folder, ours), "--against", greedy, "--resamples", "200")
    against = scores()["against"]
    assert against["differences"]["random: accuracy"]["value"] == 0.25
    assert against["mcnemar"] == {"only_first_right": 5, "only_second_right": 0, "p": 0.0625}
    assert "McNemar: right only here 5, only there 0, p 0.0625" in capsys.readouterr().out


def test_partial_and_against_a_run_that_answered_other_questions_too(folder):
    ours = pope_answers(Path("ours.jsonl"), ["Yes"] * 12)
    greedy = write_lines(Path("g.jsonl"), [{"question_id": i, "text": "No"} for i in range(5, 21)])
    words = [*random(folder, ours), "--against", greedy]
    refused("8 of 20 questions have no answer", run, *words)
    assert not Path("out").exists()
    run(*words, "--partial")
    record, against = scores()["record"], scores()["against"]
    assert (record["questions"], record["questions_given"], against["questions"]) == (12, 20, 8)
    assert against["mcnemar"]["only_first_right"] == 4


def test_chair_and_mme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    coco = coco_folder(tmp_path / "coco", {1: ["dog"], 2: ["cat"]}, {1: ["A dog."], 2: ["A cat."]})
    texts = {1: "A dog and a bear.", 2: "A kitten."}
    captions = write_lines(Path("c.jsonl"), [{"image_id": image, "caption": text} for image, text in texts.items()])
    words = ["--protocol", "chair/512", "--data", coco, "--rescore", captions]
    run(*words, "--synonyms", coco / "synonyms.txt")
    found = scores("runs/chair-512")
    assert found["figures"]["C_S"]["value"] == 0.5 and found["notes"]["words"] == "synonyms.txt"
    assert found["record"]["files"].keys() == {"instances", "captions", "synonyms"}
    write_json(coco / "annotations/instances_val2014.json", {"annotations": [], "images": None})
    refused("'images' of annotations .* is not a list of objects", run, *words, "--out", "out")
    assert not Path("out").exists()
    tasks = ("existence", "count", "position", "color")
    mme_folder(tmp_path / "mme", dict.fromkeys(tasks, ["1"]))
    Path("given").mkdir()
    asked = {"Is it so? Please answer yes or no.": "Yes", "Is it not? Please answer yes or no.": "No"}
    for task in tasks:
        Path(f"given/{task}.txt").write_text("".join(f"1.jpg\t{text}\t{word}\tYes\n" for text, word in asked.items()))
    run("--protocol", "mme", "--data", tmp_path / "mme", "--rescore", "given")
    figure = {"value": 200.0, "interval": [200.0, 200.0], "n": 8, "unit": "points"}
    assert scores("runs/mme-hallucination")["figures"]["hallucination"] == figure


def test_list_names_every_protocol(capsys):
    assert run("--list") == 0
    out = capsys.readouterr().out
    assert "pope/vcd" in out and "chair/opera-64" in out and "choices/muirbench" in out
    assert out.count("  data: https://") >= 12 and "annotations_trainval2014.zip" in out


def test_wrong_words(folder):
    pope_answers(Path("a.jsonl"), ["Yes"])
    rescored = ["--protocol", "pope", "--rescore", "a.jsonl"]
    for words, message in (
        ([], "no protocol given"),
        (["--protocol", "pope"], "give a model that answers"),
        ([*rescored, "--data", "nowhere"], "cannot be read|not a folder"),
        ([*rescored, "--source", "flickr"], "source 'flickr' is unknown"),
        ([*rescored, "--group", "easy"], "no split 'easy'; there are random"),
        ([*rescored, "--group", "randm"], "no split 'randm'; did you mean 'random'"),
        (["--protocol", "pope", "--rescore", "randm=a.jsonl"], "randm=a.jsonl: there is no group 'randm'; give GROUP="),
        ([*rescored, "--colour"], "--colour is not a flag of this command"),
        ([*rescored, "--data", folder, "--controls"], "--controls and --processes need a model that answers"),
        ([*rescored, "--data", folder, "--processes", 2], "--controls and --processes need a model that answers"),
    ):
        refused(message, run, *words)


def test_from_the_command_line_errors_are_one_line_and_code_2(folder):
    """In a process of its own, with JAX told to use a platform that does not exist: no model is touched. The record of
    our own runs is taken over."""
    pope_answers(Path("a.jsonl"), ["Yes"] * 20)
    stored = {"model": "pocket", "model_sha256": "abc", "method": {"name": "CMAC", "alpha": 3.0}, "seed": 4}
    write_json(Path("a.jsonl.run.json"), stored)
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "none_such", "HOME": str(folder)}

    def call(path):
        command = [sys.executable, *map(str, [ROOT / "tools/evaluate.py", *random(folder, path)])]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    done = call("a.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    record = scores()["record"]
    assert record["model"]["sha256"] == "abc" and record["method"]["alpha"] == 3.0 and record["seed"] == 4
    assert record["decoding_known"] is True
    Path("out/scores.json").unlink()
    Path("b.jsonl").write_text('{"question_id": 1, "text": "Yes"}\n{"question')
    done = call("b.jsonl")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("lvlm evaluate: line 2 of answer file 'b.jsonl' is not JSON")
    assert list(Path("out").iterdir()) == []
