"""The command line: the demo, answers beside each other, jobs, and one line with exit code 2 for every bad input."""

import dataclasses
import functools
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from lvlm_jax import config_files, methods
from lvlm_jax.cli import infer
from lvlm_jax.weights import names
from tests.cli import command as command_line
from tests.cli.command import run, write_small
from tests.processors.test_images import png_with_header
from tests.refusals import refused

ROOT = pathlib.Path(__file__).parents[2]
POCKET = names.pocket_file("checkpoint")
SAMPLE = str(names.pocket_file("sample.png"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The pocket model cut down to two decoder layers: it compiles sooner, and what it says does not matter here."""
    return write_small(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def command(monkeypatch, capsys, caplog, tmp_path):
    """Runs `lvlm infer` in this process, in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    # What TRANSFORMERS_VERBOSITY does in a process of its own, where transformers is not loaded yet.
    caplog.set_level("ERROR", logger="transformers")
    return functools.partial(run, monkeypatch, capsys, "infer")


@pytest.fixture
def refuses(command, monkeypatch, capsys):
    """Runs a command line that must end with code 2 and one line on stderr that holds a message."""
    return lambda message, *words: command_line.refuses(monkeypatch, capsys, re.escape(message), "infer", *words)


def test_the_demo_answers_greedy_beside_vcd_and_draws_both(command, small, tmp_path):
    code, out, error = command("--model", small, "--max-new-tokens", 10)
    assert (code, error) == (0, "")
    lines = out.rstrip("\n").split("\n")
    prompts = config_files.load_config("infer").demo.prompts
    assert prompts[0] == "Describe the image."
    for prompt in prompts:
        place = lines.index(prompt)
        assert lines[place + 1].startswith("  greedy  ") and lines[place + 2].startswith("  VCD     ")
    assert lines[1].startswith("in the picture: ") and "elephant" in lines[1] and "fork" not in lines[1]
    assert "runs/demo.png" in lines[-1]
    picture = Image.open(tmp_path / "runs" / "demo.png")
    assert picture.format == "PNG" and picture.height > 400


def test_several_images_and_questions_streamed_as_generated(command, small):
    words = ["--model", small, "--image", SAMPLE, "--image", SAMPLE, "--prompt", "<image> or <image>?"]
    words += ["--prompt", "Why?", "--method", "CMAC", "--alpha", 1, "--max_new_tokens", 12]
    _, whole, _ = command(*words)
    _, streamed, _ = command(*words, "--stream")
    assert whole == streamed
    assert whole.count("greedy") == whole.count("CMAC") == 2
    _, alone, _ = command(*words, "--no-compare")
    assert "greedy" not in alone and alone.count("CMAC") == 2


def test_sampling_repeats_with_its_seed(command, small):
    words = ["--model", small, "--image", SAMPLE, "--prompt", "Describe.", "--temperature", 1.5]
    words += ["--max-new-tokens", 12, "--seed"]
    first, again, other = (command(*words, seed)[1] for seed in (1, 1, 2))
    assert first == again != other


def ask_by(*words):
    """The settings of a command line that asks something."""
    return infer.command_line(["--prompt", "a", *words])


def test_a_method_has_its_fields_as_flags():
    words = ["--image", "a", "--method", "cmac"]
    assert ask_by(*words).method == methods.CMAC() and ask_by(*words[:2]).method is None
    given = ask_by(*words, "--alpha", "1", "--variant=code", "--no-imd", "--distort", "attention_mask")
    assert given.method == methods.CMAC(alpha=1.0, variant="code", imd=False, distort="attention_mask")
    name, fields = next(iter(methods.CMAC.PRESETS.items()))
    preset = ask_by(*words, "--preset", name, "--gamma", "2.5")
    assert preset.method == methods.CMAC(**fields | {"gamma": 2.5})
    # One may have the name of a general flag.
    parsed = ask_by("--method", "vcd", "--seed", "3", "--vcd-seed", "5")
    assert (parsed.seed, parsed.method) == (3, methods.VCD(seed=5))
    for words, method in (
        ("sevi --start-layer 0.25", methods.SEVI(start_layer=0.25)),
        ("sevi --layers 1,3", methods.SEVI(layers=(1, 3))),
        ("dola --layers high", methods.DoLa(layers="high")),
        ("dola --layers 0,2", methods.DoLa(layers=(0, 2))),
        ("vista --lambda 0.3", methods.VISTA(lambda_=0.3)),
    ):
        assert ask_by("--method", *words.split()).method == method


def test_methods_joined_by_a_plus_are_chained():
    words = ["--method", "eah+cmac"]
    members = ask_by(*words, "--alpha", "2", "--eah-beta", "0.5", "--cmac-beta", "0.4").method.members
    assert members == (methods.EAH(beta=0.5), methods.CMAC(alpha=2.0, beta=0.4))
    preset = ask_by(*words, "--cmac-preset", "llava-1.5/mme").method
    assert preset.members == (methods.EAH(), methods.CMAC.preset("llava-1.5/mme"))
    refused("--beta is not a flag of this command", ask_by, *words, "--beta", "0.1")
    refused("--alpha is 'lots'; expected a number$", ask_by, "--method", "cmac", "--cmac-alpha", "lots")
    refused("--layers is '1;2'; expected a number, several", ask_by, "--method", "sevi", "--layers", "1;2")
    refused("--top-k is '2.5'; expected a whole number$", ask_by, "--top-k", "2.5")
    refused(r"--compar is not a flag of this command; did you mean --compare\?", ask_by, "--compar")


def test_defaults_come_from_the_config_and_both_spellings_of_a_flag_count(tmp_path):
    config = tmp_path / "mine.py"
    config.write_text((ROOT / "configs" / "infer.py").read_text().replace("max_new_tokens = 256", "max_new_tokens = 7"))
    given = ask_by("--config", str(config), "--top_p", "0.5")
    assert (given.max_new_tokens, given.top_p) == (7, 0.5)
    assert ask_by("--top-p=0.5", "--max_new_tokens=9").max_new_tokens == 9


def test_help_names_every_flag_and_every_methods_settings(command):
    code, out, _ = command("--help")
    assert code == 0
    for flag in ("--model-path", "--question-file", "--image-folder", "--answers-file", "--temperature", "--seed"):
        assert flag in out
    for name in methods.names():
        assert f"  {name}: " in out
        for field in dataclasses.fields(methods.get(name)):
            shown = f"--{field.name.strip('_').replace('_', '-')} " in out
            assert shown != ("data" in field.metadata)  # pictures and vectors are not for a command line


def test_a_job_writes_llavas_answer_file(command, refuses, small, tmp_path):
    (tmp_path / "questions.jsonl").write_text(
        '{"question_id": 1, "image": "sample.png", "text": "Is there a dog?"}\n'
        '{"question_id": 2, "image": \n'
        '{"question_id": 3, "image": ["sample.png", "sample.png"], "text": "Which has a dog?"}\n'
    )
    model = ["--model-path", small, "--method", "cmac", "--max_new_tokens", 8]
    files = ["--question-file", "questions.jsonl", "--answers-file", "answers.jsonl"]
    files += ["--image-folder", POCKET.parent]
    code, out, error = command(*model, *files)
    assert code == 2
    assert error.startswith("line 2 of questions.jsonl: not JSON (Expecting value") and error.count("\n") == 1
    assert "0 answered before, 2 now, 1 failed" in out
    first, second = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert list(first) == ["question_id", "prompt", "text", "model_id", "image", "metadata"]
    assert (first["question_id"], first["model_id"], first["image"]) == (1, "small", "sample.png")
    assert (second["question_id"], second["image"]) == (3, ["sample.png", "sample.png"])
    assert second["metadata"]["method"]["alpha"] == 3.0

    _, alone, _ = command(*model, "--no-compare", "--image", SAMPLE, "--prompt", "Is there a dog?")
    assert alone.split("  CMAC  ")[1].split() == first["text"].split()
    code, _, error = command(*model, *files, "--system", "vicuna")
    assert code == 2 and "begun with other settings (system: ''" in error
    (tmp_path / "questions.jsonl").write_text('{"question_id": 1, "text": "Hello"}\n')
    refuses("begun with other settings", *model, *files)


def test_bad_pictures_prompts_and_flags(command, refuses, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "bomb.png").write_bytes(png_with_header(30_000, 30_000))
    for message, words in (
        ("an image format", "--image text.jpg --prompt a"), ("900,000,000 pixels", "--image bomb.png --prompt a"),
        ("does not exist", "--image missing.png --prompt a"), ("nothing to ask", f"--image {SAMPLE}"),
        ("it is a setting of --method adaiat or avisc or cmac or", "--prompt a --alpha 3"), ("magic", "--method magic"),
        ("alpha is -1", "--method cmac --alpha -1"), ("--beta", "--method cmac --beta much"),
        ("--variant", "--method cmac --variant third"), ("third", "--method cmac --preset third"),
        ("--top-p", "--top_p 0"), ("--temperature", "--temperature nan"), ("--max-new-tokens", "--max_new_tokens"),
        ("missing.py", "--config missing.py"), ("--answers-file", "--question-file questions.jsonl"),
        ("--prompt", "--question-file a --answers-file b --prompt c"),
        ("cannot be read", "--question-file missing.jsonl --answers-file b"),
        ("needs an image", "--prompt a --attention-map b.png"),
    ):  # fmt: skip
        refuses(message, *words.split())
    refuses("2 <image> placeholders but 1 images", "--image", SAMPLE, "--prompt", "<image> <image> a")
    code, _, error = command("--image", SAMPLE, "--prompt", "word " * 3000)
    assert code == 2 and "and the model's context is 1024" in error


def test_bad_checkpoints(refuses, tmp_path):
    """Here only one line and code 2 are checked; `tests/weights` checks the messages."""
    refuses("nowhere", "--model", tmp_path / "nowhere", "--prompt", "a")
    for name, message in (("model.safetensors", "truncated"), ("config.json", "gpt_quiz")):
        folder = shutil.copytree(POCKET, tmp_path / name)
        content = (folder / name).read_bytes()
        broken = content[:1000] if name == "model.safetensors" else b'{"model_type": "gpt_quiz"}'
        (folder / name).write_bytes(broken)
        refuses(message, "--model", folder, "--prompt", "a")


def test_a_real_process_prints_one_line_and_no_traceback(tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    words = [sys.executable, ROOT / "infer.py", "--image", "text.jpg", "--prompt", "a"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("lvlm infer: image 'text.jpg'") and done.stderr.count("\n") == 1
