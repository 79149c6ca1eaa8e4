"""A full disk gives one line and exit code 2; the same command with more room then writes the usual files."""

import json
import shutil
import subprocess

import pytest

from lvlm_jax.pocket.splits import write_split
from lvlm_jax.weights import names
from tests.cli.command import run, write_small
from tests.killing import contents

pytestmark = pytest.mark.slow

SAMPLE = names.pocket_file("sample.png")
ROOM = 1 << 26  # bytes; for everything


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small model; questions, prompts and conversations about an image; a split of the drawn world; a run of it."""
    folder = tmp_path_factory.mktemp("world")
    write_small(folder / "model")
    shutil.copy(SAMPLE, folder / "sample.png")
    image = {"images": ["sample.png"]}
    said = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A red ball."}]
    rows = {
        "questions": [
            {"question_id": n, "image": "sample.png", "text": f"Is there a dog? {n} " + "Look. " * 40}
            for n in range(100)
        ],
        "prompts": [image | {"prompt": f"What is number {n}? " + "Look. " * 20} for n in range(40)],
        "talks": [image | {"messages": said} for _ in range(8)],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_split(folder / "split", "test", 8)
    return folder


@pytest.fixture
def disk(tmp_path):
    """disk(bytes): a folder on a small disk of that size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")

    def sized(size):
        subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
        return folder

    yield sized
    subprocess.run(["umount", "-l", folder], check=True)


def infer(world, out):
    files = ["--question-file", world / "questions.jsonl", "--answers-file", out / "answers.jsonl"]
    return [*files, "--model", world / "model", "--image-folder", world, "--max_new_tokens", "4", "--batch-size", "8"]


def evaluate(world, out):
    words = ["--protocol", "pope/strict", "--data", world / "split", "--model", world / "model", "--out", out]
    return [*words, "--resamples", "10"]


def train(world, out):
    config = dict(model=world / "model", data=world / "talks.jsonl", steps=4, batch=2, length=256)
    config |= {"lora.rank": 2, "loop.workers": 0, "loop.save_every": 1, "loop.log_every": 1}
    return ["--config", "sft", "--workdir", out, *(f"--config.{name}={value}" for name, value in config.items())]


def convert(world, out):
    return [world / "model", out / "model", "--dtype", "bfloat16", "--overwrite"]


def preferences(world, out):
    words = ["--prompts", world / "prompts.jsonl", "--model", world / "model", "--out", out, "--rejected-by", "plain"]
    return [*words, "--batch-size", "8", "--max-new-tokens", "6", "--keep-unfinished", "--near-duplicate", "1"]


def report(world, out):
    return [world / "run", "--out", out]


# What is compared byte for byte; other files say when something was done.
COMPARED = {
    infer: ["answers.jsonl", "answers.jsonl.run.json"],
    evaluate: ["adversarial.jsonl", "popular.jsonl", "random.jsonl"],
    train: ["adapter/adapter_model.safetensors", "export/model.safetensors"],
    convert: ["model/config.json", "model/model.safetensors", "model/tokenizer.json"],
    preferences: ["pairs.jsonl", "statistics.json", "answers.jsonl"],
    report: ["index.html", "report.md"],
}


@pytest.mark.parametrize("command", COMPARED)
def test_a_disk_that_fills_up(command, world, disk, tmp_path, monkeypatch, capsys):
    def asked(command, out):
        return run(monkeypatch, capsys, command.__name__, *command(world, out))

    if command is report:
        assert asked(evaluate, world / "run")[0] == 0
    code, _, error = asked(command, tmp_path / "whole")
    assert code == 0, error
    whole = contents(tmp_path / "whole")
    assert whole.keys() >= set(COMPARED[command])
    pages = sum(-(-len(content) // 4096) for content in whole.values())
    for part in (0.1, 0.5, 0.9):
        code, _, error = asked(command, disk(max(1, int(part * pages)) * 4096) / "out")
        told = [line for line in error.splitlines() if line.startswith(f"lvlm {command.__name__}: ")]
        assert code == 2 and "Traceback" not in error, error
        assert "No space left on device" in told[-1] and len(told[-1]) <= 300 and error.endswith(told[-1] + "\n")
    code, _, error = asked(command, disk(ROOM) / "out")
    assert code == 0, error
    found = contents(tmp_path / "disk" / "out")
    if command is not train:  # whose checkpoints and curves have names of their own
        assert found.keys() == whole.keys()
    assert [name for name in COMPARED[command] if found[name] != whole[name]] == []
