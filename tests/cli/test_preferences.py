"""The command: pairs from the pocket world, from prompts and a model, from other people's pairs; faults in one line."""

import functools
import json
import re

import pytest

from lvlm_jax import methods
from lvlm_jax.pocket.pairs import sample_prompts
from lvlm_jax.training.data import preferences
from lvlm_jax.training.data.pair_files import read_pairs
from tests.cli.command import refuses, run
from tests.evaluation.builders import write_lines
from tests.training.stand_in import StandIn, prompt


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs `lvlm preferences` in this process, in a folder with two pictures: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    prompt(tmp_path, "a", images=2)
    return functools.partial(run, monkeypatch, capsys, "preferences")


@pytest.fixture
def stand_in(monkeypatch):
    """Replaces every checkpoint by the stand-in."""
    model = StandIn()
    monkeypatch.setattr(preferences.LVLM, "from_pretrained", lambda path, dtype: model)
    return model


def test_pairs_of_the_pocket_world(command, stand_in, tmp_path):
    words = ("--pocket", 12, "--out", "out", "--holdout", 0.25, "--batch-size", 4, "--seed", 2)
    code, out, _ = command(*words)
    assert code == 0 and "written to out/pairs.jsonl" in out
    training, validation = (read_pairs(tmp_path / "out" / f"{name}.jsonl") for name in ("pairs", "validation"))
    assert (len(training), len(validation)) == (9, 3)
    drawn = [asked for _, asked in sample_prompts(12, seed=2)]
    for pair in (*training, *validation):
        asked = drawn[int(pair.id.split("/")[1])]
        assert (pair.chosen, len(pair.images)) == (asked.truth, len(asked.scenes))
        assert pair.rejected == f"truncated {asked.text}"
    line = json.loads((tmp_path / "out" / "pairs.jsonl").read_text().split("\n")[0])
    assert all((tmp_path / "out" / name).is_file() for name in line["images"])
    figures = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert (figures["prompts"], figures["kept"], figures["corrected"]) == (12, 12, 1.0)
    assert figures["negation"] == 0.5 and figures["rejected_by"] == {"answer": 12, "sample": 0, "option": 0}
    # Again with another corrector: the answers are in the log, and no model is asked.
    asked = len(stand_in.calls)
    assert command(*words, "--corrector", "none")[0] == 0
    assert len(stand_in.calls) == asked
    assert read_pairs(tmp_path / "out" / "pairs.jsonl")[0].chosen.startswith("cross")
    code, _, error = command(*words[:-1], 3)
    assert code == 2 and "has prompts of other settings" in error


def test_flags_reach_the_model_and_the_record(command, stand_in, tmp_path):
    write_lines(tmp_path / "p.jsonl", [{"images": ["a_0.png", "a_1.png"], "prompt": "Same?"}])
    attention = ("--rho", 0.8, "--sigma", 0.3, "--variant", "code-qwen", "--preset", "glm-4.1v")
    sampling = ("--temperature", 0.7, "--top-p", 0.9, "--max-new-tokens", 5)
    code, _, _ = command("--prompts", "p.jsonl", "--model", "m", "--out", "a", *attention, *sampling)
    chosen, rejected = stand_in.calls
    assert code == 0
    assert chosen["method"] == methods.CAPL(rho=0.8, sigma=0.3)
    assert rejected["method"] == methods.CAPL(mode="truncated", variant="code-qwen")
    given = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5}
    assert given.items() <= chosen.items() and given.items() <= rejected.items()
    record = json.loads((tmp_path / "a" / "pairs.jsonl.run.json").read_text())
    assert record["method"]["rho"] == 0.8 and record["rejected_method"]["mode"] == "truncated"
    assert record["generation"]["max_new_tokens"] == 5 and record["corrector"] is None
    words = ("--prompts", "p.jsonl", "--model", "m", "--out", "b", "--rejected-by", "plain", "--preset", "glm-4.1v")
    code, _, _ = command(*words)
    chosen, rejected = stand_in.calls[2:]
    assert code == 0 and chosen["method"] == methods.CAPL(rho=0.9) and rejected["method"] is None
    assert (chosen["temperature"], rejected["temperature"]) == (0.0, 1.0)


def test_pairs_that_teach_to_contradict_the_model_are_refused_with_the_figure(command, stand_in, tmp_path):
    """The model's chosen answers are "cross ...", its rejected ones "truncated ..."; one of four is right."""
    rows = [
        {
            "images": ["a_0.png"],
            "prompt": f"{name}?",
            "truth": "cross d?" if name == "d" else "Yes",
            "wrong": ["no"],
            "id": name,
        }
        for name in "abcd"
    ]
    write_lines(tmp_path / "p.jsonl", rows)
    write_lines(tmp_path / "c.jsonl", [{"id": row["id"], "chosen": row["truth"]} for row in rows])
    words = ("--prompts", "p.jsonl", "--model", "m", "--corrector", "c.jsonl", "--out", "out")
    stand_in.rejected = "cross"
    code, _, error = command(*words)
    assert code == 2 and "100.0 % of 3 pairs are won by a policy that only contradicts the model" in error
    assert not (tmp_path / "out" / "pairs.jsonl").exists()
    assert command(*words, "--max-negation", 1)[0] == 0
    code, out, _ = command(*words[:-1], "ladder", "--ladder", "--max-negation", 0.75)
    assert code == 0 and "won by contradicting     0.75" in out
    pairs = {pair.id: pair.rejected for pair in read_pairs(tmp_path / "ladder" / "pairs.jsonl")}
    assert pairs["a"] == "cross a?" and pairs["d"].startswith("cross d? ")  # a sample of it, with its seed
    write_lines(tmp_path / "p.jsonl", [{"images": ["a_0.png"], "prompt": "What?"}])
    assert "--ladder needs the truth of every prompt" in command(*words[:4], "--ladder")[2]


def test_pairs_of_a_model(command, model, checkpoint, tmp_path):
    rows = [
        {"images": ["a_0.png", "a_1.png"], "prompt": "Same?"},
        {"images": ["a_1.png", "a_0.png"], "prompt": "<image>, <image>: alike?"},
        {"images": ["a_0.png"], "prompt": "What?"},
    ]
    write_lines(tmp_path / "p.jsonl", rows)
    words = ("--prompts", "p.jsonl", "--model", checkpoint, "--max-new-tokens", 6, "--batch-size", 2)
    code, _, error = command(*words, "--keep-unfinished", "--out", "out")
    log = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().split("\n")[1:-1]]
    said = {entry["id"]: entry for entry in log}
    pictures = [{"type": "image", "image": str(tmp_path / name)} for name in rows[0]["images"]]
    messages = [{"role": "user", "content": [*pictures, {"type": "text", "text": "Same?"}]}]
    for side, mode in (("chosen", "cross"), ("rejected", "truncated")):
        expected = model.generate(messages, methods.CAPL(mode=mode), max_new_tokens=6).text[0]
        assert said["1"][side] == expected.strip()
    assert said["1"]["chosen"] != said["1"]["rejected"]
    assert said["3"]["chosen"] == said["3"]["rejected"]  # one picture has no other to look at
    assert code == 0, error
    differ = sorted(entry["id"] for entry in log if entry["chosen"] != entry["rejected"])
    assert [pair.id for pair in read_pairs(tmp_path / "out" / "pairs.jsonl")] == differ


def test_pairs_that_are_there(command, monkeypatch, capsys, tmp_path):
    rows = [
        {"question": "What?", "chosen": "A red dog.", "rejected": "A cat.", "image": "a_0.png", "idx": 4},
        {"question": "What?", "chosen": "Yes", "rejected": "yes.", "image": "a_1.png", "idx": 5},
        {"question": "What?", "chosen": "A cup.", "rejected": "A red cup.", "image": "a_1.png", "idx": 6},
    ]
    write_lines(tmp_path / "rlhf_v.jsonl", rows)
    code, out, _ = command("--pairs", "rlhf_v.jsonl", "--out", "out", "--holdout", 0.5)
    assert code == 0 and "dropped: equal           1" in out
    (training,), (held,) = (read_pairs(tmp_path / "out" / f"{name}.jsonl") for name in ("pairs", "validation"))
    assert {training.id, held.id} == {"4", "6"} and training.images != held.images
    for words, message in (
        (("--pairs", "out/pairs.jsonl", "--out", "out"), "would be overwritten"),
        (("--pairs", "rlhf_v.jsonl", "--model", "pocket"), "leave --model, --corrector and --ladder out"),
        (("--pairs", "missing.jsonl"), "cannot be read"),
    ):
        refuses(monkeypatch, capsys, message, "preferences", *words)


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "one of the arguments --prompts --pocket --pairs is required"),
        (("--prompts", "p.jsonl"), "no model to answer the prompts"),
        (("--prompts", "empty.jsonl", "--model", "m"), "is empty"),
        (("--prompts", "nowhere.jsonl", "--model", "m"), "cannot be read"),
        (("--prompts", "broken.jsonl", "--model", "m"), "line 2 of .*broken.jsonl.* is not JSON"),
        (("--prompts", "blind.jsonl", "--model", "m"), "line 1 of .*gone.png' does not exist"),
        (("--prompts", "p.jsonl", "--model", "m", "--corrector", "c.jsonl"), "corrector 'c.jsonl' is unknown"),
        (("--prompts", "p.jsonl", "--model", "m", "--corrector", "pocket"), "needs the truth"),
        (("--prompts", "p.jsonl", "--model", "m", "--corrector", "silent:judge"), "returned None"),
        (("--prompts", "p.jsonl", "--model", "m", "--max-words", 1), "none of 1 prompts became a pair"),
        (("--prompts", "p.jsonl", "--model", "m", "--holdout", 0.5), "cannot be held out"),
        (("--pocket", 0), "0 is out of range"),
        (("--pocket", 3, "--rho", 1.5), "1.5 is out of range"),
        (("--pocket", 3, "--holdout", 1), "1 is out of range"),
    ],
)  # fmt: skip
def test_faults_are_one_line(command, stand_in, tmp_path, words, message):
    good = json.dumps({"images": ["a_0.png"], "prompt": "What?"})
    (tmp_path / "p.jsonl").write_text(good)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text(good + "\n{")
    (tmp_path / "blind.jsonl").write_text(json.dumps({"images": ["gone.png"], "prompt": "What?"}))
    (tmp_path / "silent.py").write_text("def judge(prompt, answer):\n    return None\n")
    code, _, error = command(*words)
    assert code == 2
    lines = [line for line in error.splitlines() if line.startswith("lvlm preferences: ")]
    assert len(lines) == 1 and re.search(message, lines[0])
    assert "Traceback" not in error
