"""`tools/evaluate.py --rescore`: the whole way, and one clear line for everything that is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lvlm_jax.cli import evaluate
from lvlm_jax.errors import LVLMError
from tests.evaluation.builders import coco_folder, mme_folder, pope_answers, pope_folder, write_lines

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("random", "popular", "adversarial")


def run(*words):
    return evaluate.main([str(word) for word in words])


def random(folder, path):
    """Words that score answers to POPE's random split."""
    return ["--protocol", "pope", "--data", folder, "--group", "random", "--rescore", path]


def scores(folder="out"):
    return json.loads((Path(folder) / "scores.json").read_text())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return pope_folder(tmp_path / "data", dict.fromkeys(SPLITS, "yynn" * 5))


def test_three_splits(folder, capsys):
    words = [f"{split}={pope_answers(Path(f'{split}.jsonl'), ['Yes', 'No', 'No', 'maybe'] * 5)}"
             for split in SPLITS]  # fmt: skip
    given = ["--data", folder, "--rescore", *words, "--model-name", "llava"]
    assert run("--protocol", "pope/strict", *given) == 0
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
    run(*random(folder, ours), "--against", greedy, "--out", "out", "--resamples", "200")
    against = scores()["against"]
    assert against["differences"]["random: accuracy"]["value"] == 0.25
    assert against["mcnemar"] == {"only_first_right": 5, "only_second_right": 0, "p": 0.0625}
    assert "McNemar: right only here 5, only there 0, p 0.0625" in capsys.readouterr().out


def test_against_a_run_that_answered_other_questions_too(folder):
    ours = pope_answers(Path("ours.jsonl"), ["Yes"] * 12)
    greedy = write_lines(Path("g.jsonl"), [{"question_id": i, "text": "No"} for i in range(5, 21)])
    words = [*random(folder, ours), "--against", greedy, "--out", "out"]
    with pytest.raises(LVLMError, match="8 of 20 questions have no answer"):
        run(*words)
    run(*words, "--partial")
    found = scores()
    assert found["record"]["questions"] == 12 and found["against"]["questions"] == 8
    assert found["against"]["mcnemar"]["only_first_right"] == 4


def test_the_record_of_our_own_runs_is_taken_over(folder):
    path = pope_answers(Path("a.jsonl"), ["Yes"] * 20)
    stored = {"model": "pocket", "model_sha256": "abc", "method": {"name": "CMAC", "alpha": 3.0}, "seed": 4}
    Path("a.jsonl.run.json").write_text(json.dumps(stored))
    run(*random(folder, path), "--out", "out")
    record = scores()["record"]
    assert record["model"]["sha256"] == "abc" and record["method"]["alpha"] == 3.0 and record["seed"] == 4
    assert record["decoding_known"] is True


def test_partial(folder):
    path = pope_answers(Path("a.jsonl"), ["Yes"] * 10)
    words = [*random(folder, path), "--out", "out"]
    with pytest.raises(LVLMError, match="10 of 20 questions have no answer"):
        run(*words)
    assert not Path("out").exists()
    run(*words, "--partial")
    record = scores()["record"]
    assert (record["questions"], record["questions_given"]) == (10, 20)


def test_chair_and_mme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    coco = coco_folder(tmp_path / "coco", {1: ["dog"], 2: ["cat"]}, {1: ["A dog."], 2: ["A cat."]})
    captions = write_lines(Path("c.jsonl"), [{"image_id": 1, "caption": "A dog and a bear."},
                                             {"image_id": 2, "caption": "A kitten."}])  # fmt: skip
    synonyms = ["--synonyms", coco / "synonyms.txt"]
    run("--protocol", "chair/512", "--data", coco, *synonyms, "--rescore", captions)
    found = scores("runs/chair-512")
    assert found["figures"]["C_S"]["value"] == 0.5
    assert found["record"]["files"].keys() == {"instances", "captions", "synonyms"}
    assert found["notes"]["words"] == "synonyms.txt"
    mme_folder(tmp_path / "mme", {task: ["1"] for task in ("existence", "count", "position", "color")})
    for task in ("existence", "count", "position", "color"):
        Path("given").mkdir(exist_ok=True)
        Path(f"given/{task}.txt").write_text("1.jpg\tIs it so? Please answer yes or no.\tYes\tYes\n"
                                             "1.jpg\tIs it not? Please answer yes or no.\tNo\tYes\n")  # fmt: skip
    run("--protocol", "mme", "--data", tmp_path / "mme", "--rescore", "given")
    figure = {"value": 200.0, "interval": [200.0, 200.0], "n": 8, "unit": "points"}
    assert scores("runs/mme-hallucination")["figures"]["hallucination"] == figure


def test_list_names_every_protocol(capsys):
    assert run("--list") == 0
    out = capsys.readouterr().out
    assert "pope/vcd" in out and "chair/opera-64" in out and "choices/muirbench" in out
    assert out.count("  data: https://") >= 12 and "annotations_trainval2014.zip" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no protocol given"),
        (["--protocol", "pope"], "give a model that answers"),
        (["--protocol", "pope", "--rescore", "a.jsonl", "--data", "nowhere"], "cannot be read|not a folder"),
        (["--protocol", "pope", "--rescore", "a.jsonl", "--source", "flickr"], "source 'flickr' is unknown"),
        (["--protocol", "pope", "--rescore", "a.jsonl", "--group", "easy"], "no split 'easy'; there are random"),
        (["--protocol", "pope", "--rescore", "a.jsonl", "--group", "randm"], "no split 'randm'; did you mean 'random'"),
        (["--protocol", "pope", "--rescore", "randm=a.jsonl"], "randm=a.jsonl: there is no group 'randm'; give GROUP="),
        (["--protocol", "pope", "--rescore", "a.jsonl", "--colour"], "--colour is not known here"),
    ],
)
def test_wrong_words(folder, words, message):
    pope_answers(Path("a.jsonl"), ["Yes"])
    with pytest.raises(LVLMError, match=message):
        run(*words)


def test_from_the_command_line_errors_are_one_line_and_code_2(folder):
    """In a process of its own, with JAX told to use a platform that does not exist: no model is touched."""
    pope_answers(Path("a.jsonl"), ["Yes"] * 20)
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "none_such"}
    environment["HOME"] = str(folder)

    def call(path):
        words = [ROOT / "tools/evaluate.py", *random(folder, path), "--out", "out"]
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    done = call("a.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    Path("out/scores.json").unlink()
    Path("b.jsonl").write_text('{"question_id": 1, "text": "Yes"}\n{"question')
    done = call("b.jsonl")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("lvlm evaluate: line 2 of answer file 'b.jsonl' is not JSON")
    assert list(Path("out").iterdir()) == []


def test_annotations_of_another_shape_leave_nothing(tmp_path):
    coco = coco_folder(tmp_path, {1: ["dog"]}, {1: ["A dog."]})
    (coco / "annotations/instances_val2014.json").write_text('{"annotations": [], "images": null}')
    captions = write_lines(tmp_path / "c.jsonl", [{"image_id": 1, "caption": "A dog."}])
    with pytest.raises(LVLMError, match="'images' of annotations .* is no list of objects"):
        run("--protocol", "chair", "--data", coco, "--rescore", captions, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_id_is_an_id(folder):
    path = write_lines(Path("a.jsonl"), [{"question_id": "", "text": "Yes"}])
    with pytest.raises(LVLMError, match="is none of the 20 questions"):
        run(*random(folder, path))
