"""The command line: the demo, answers beside each other, jobs, and one line with exit code 2 for every bad input."""

import dataclasses
import functools
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from lvlm_jax import config_files, methods
from lvlm_jax.cli import infer
from lvlm_jax.errors import LVLMError
from lvlm_jax.weights import names
from tests.cli.command import run, write_small
from tests.killing import Command, contents, kill_and_finish, more_lines
from tests.processors.test_images import png_with_header

pytestmark = pytest.mark.full_compiler  # the answers of another process

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
def refuses(command):
    """Runs a command line that must end with code 2 and one line on stderr, which is returned."""

    def refused(*words):
        code, _, error = command(*words)
        assert code == 2
        assert error.startswith("lvlm infer: ") and error.count("\n") == 1
        return error

    return refused


def test_the_demo_answers_greedy_beside_cmac_and_draws_both(command, small, tmp_path):
    code, out, error = command("--model", small, "--max-new-tokens", 10)
    assert (code, error) == (0, "")
    lines = out.rstrip("\n").split("\n")
    prompts = config_files.load_config("infer").demo.prompts
    assert "Please describe this image in detail." in prompts
    for prompt in prompts:
        place = lines.index(prompt)
        assert lines[place + 1].startswith("  greedy  ") and lines[place + 2].startswith("  CMAC    ")
    assert "runs/demo.png" in lines[-1]
    picture = Image.open(tmp_path / "runs" / "demo.png")
    assert picture.format == "PNG" and picture.height > 400


def test_several_images_and_questions_streamed_as_generated(command, small):
    words = [
        "--model",
        small,
        "--image",
        SAMPLE,
        "--image",
        SAMPLE,
        "--prompt",
        "<image> or <image>?",
        "--prompt",
        "Why?",
    ]
    words += ["--method", "CMAC", "--alpha", 1, "--max_new_tokens", 12]
    _, whole, _ = command(*words)
    _, streamed, _ = command(*words, "--stream")
    assert whole == streamed
    assert whole.count("greedy") == whole.count("CMAC") == 2
    _, alone, _ = command(*words, "--no-compare")
    assert "greedy" not in alone and alone.count("CMAC") == 2


def test_sampling_repeats_with_its_seed(command):
    words = ["--image", SAMPLE, "--prompt", "Describe.", "--temperature", 1.5, "--max-new-tokens", 12, "--seed"]
    first, again, other = (command(*words, seed)[1] for seed in (1, 1, 2))
    assert first == again != other


def test_a_method_has_its_fields_as_flags():
    words = ["--image", "a", "--prompt", "b", "--method", "cmac"]
    assert infer.command_line(words).method == methods.CMAC()
    given = infer.command_line([*words, "--alpha", "1", "--variant=code", "--no-imd", "--distort", "attention_mask"])
    assert given.method == methods.CMAC(alpha=1.0, variant="code", imd=False, distort="attention_mask")
    name, fields = next(iter(methods.CMAC.PRESETS.items()))
    preset = infer.command_line([*words, "--preset", name, "--gamma", "2.5"])
    assert preset.method == methods.CMAC(**fields | {"gamma": 2.5})
    assert infer.command_line(words[:4]).method is None


def test_defaults_come_from_the_config_and_both_spellings_of_a_flag_count(tmp_path):
    config = tmp_path / "mine.py"
    config.write_text((ROOT / "configs" / "infer.py").read_text().replace("max_new_tokens = 256", "max_new_tokens = 7"))
    given = infer.command_line(["--config", str(config), "--top_p", "0.5", "--prompt", "a"])
    assert (given.max_new_tokens, given.top_p) == (7, 0.5)
    assert infer.command_line(["--top-p=0.5", "--max_new_tokens=9", "--prompt", "a"]).max_new_tokens == 9


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


def test_a_methods_setting_may_have_the_name_of_a_general_flag():
    words = ["--prompt", "a", "--method", "vcd", "--seed", "3", "--vcd-seed", "5"]
    parsed = infer.command_line(words)
    assert (parsed.seed, parsed.method) == (3, methods.VCD(seed=5))


def test_methods_joined_by_a_plus_are_chained():
    words = ["--prompt", "a", "--method", "eah+cmac", "--alpha", "2", "--eah-beta", "0.5", "--cmac-beta", "0.4"]
    members = infer.command_line(words).method.members
    assert members == (methods.EAH(beta=0.5), methods.CMAC(alpha=2.0, beta=0.4))
    preset = infer.command_line([*words[:4], "--cmac-preset", "llava-1.5/mme"]).method
    assert preset.members == (methods.EAH(), methods.CMAC.preset("llava-1.5/mme"))
    with pytest.raises(LVLMError, match="--beta is not known here"):
        infer.command_line([*words[:4], "--beta", "0.1"])


@pytest.mark.parametrize(
    ("words", "method"),
    [
        (["sevi", "--start-layer", "0.25"], methods.SEVI(start_layer=0.25)),
        (["sevi", "--layers", "1,3"], methods.SEVI(layers=(1, 3))),
        (["dola", "--layers", "high"], methods.DoLa(layers="high")),
        (["dola", "--layers", "0,2"], methods.DoLa(layers=(0, 2))),
        (["vista", "--lambda", "0.3"], methods.VISTA(lambda_=0.3)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_of_every_kind(words, method):
    assert infer.command_line(["--prompt", "a", "--method", *words]).method == method


def test_a_job_writes_llavas_answer_file(command, small, tmp_path):
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

    code, out, error = command(*model, *files, "--system", "vicuna")
    assert code == 2 and "begun with other settings" in error and "system" in error
    (tmp_path / "questions.jsonl").write_text('{"question_id": 1, "text": "Hello"}\n')
    code, out, error = command(*model, *files)
    assert code == 2 and "begun with other settings" in error and error.count("\n") == 1


def test_bad_pictures_and_prompts(refuses, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "bomb.png").write_bytes(png_with_header(30_000, 30_000))
    assert "not a picture" in refuses("--image", "text.jpg", "--prompt", "a")
    assert "900,000,000 pixels" in refuses("--image", "bomb.png", "--prompt", "a")
    assert "does not exist" in refuses("--image", "missing.png", "--prompt", "a")
    assert "2 <image> placeholders but 1 images" in refuses("--image", SAMPLE, "--prompt", "<image> <image> a")
    assert "context" in refuses("--image", SAMPLE, "--prompt", "word " * 3000)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bogus"], "--bogus is not known"),
        (["--prompt", "a", "--alpha", "3"], "it is a setting of --method adaiat or avisc or cmac or"),
        (["--method", "magic"], "magic"),
        (["--method", "cmac", "--alpha", "-1"], "alpha is -1"),
        (["--method", "cmac", "--beta", "much"], "--beta"),
        (["--method", "cmac", "--variant", "third"], "--variant"),
        (["--method", "cmac", "--preset", "third"], "third"),
        (["--top_p", "0"], "--top-p"),
        (["--temperature", "nan"], "--temperature"),
        (["--max_new_tokens"], "--max-new-tokens"),
        (["--config", "missing.py"], "missing.py"),
        (["--image", SAMPLE], "nothing to ask"),
        (["--question-file", "questions.jsonl"], "--answers-file"),
        (["--question-file", "a", "--answers-file", "b", "--prompt", "c"], "--prompt"),
        (["--question-file", "missing.jsonl", "--answers-file", "b"], "cannot be read"),
        (["--prompt", "a", "--attention-map", "b.png"], "needs a picture"),
    ],
)
def test_bad_flags(refuses, words, message):
    assert message in refuses(*words)


def test_bad_checkpoints(refuses, tmp_path):
    def ask(folder):
        return refuses("--model", folder, "--prompt", "a")

    def edited(name, edit):
        folder = tmp_path / name
        shutil.copytree(POCKET, folder)
        edit(folder)
        return folder

    def weights(change):
        def edit(folder):
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

        return edit

    def misshape(tensors):
        tensors[victim] = np.zeros((3, 5), np.float32)

    def model_type(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt_quiz"}))

    def truncate(folder):
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])

    victim = next(name for name in load_file(POCKET / "model.safetensors") if name.endswith("0.mlp.up_proj.weight"))
    assert "nowhere" in ask(tmp_path / "nowhere")
    assert "truncated" in ask(edited("truncated", truncate))
    assert victim in ask(edited("missing", weights(lambda tensors: tensors.pop(victim))))
    assert victim in ask(edited("misshapen", weights(misshape)))
    assert "gpt_quiz" in ask(edited("type", model_type))


def test_a_real_process_prints_one_line_and_no_traceback(tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    words = [sys.executable, ROOT / "infer.py", "--image", "text.jpg", "--prompt", "a"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("lvlm infer: image 'text.jpg'") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_job_killed_three_times_ends_as_if_it_had_not_been(small, tmp_path):
    entries = ({"question_id": n, "image": "sample.png", "text": f"Is there a dog? {n}"} for n in range(200))
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, entries)))

    def start(name):
        words = ["--model", small, "--image-folder", POCKET.parent]
        words += ["--question-file", tmp_path / "questions.jsonl", "--answers-file", tmp_path / name / "a.jsonl"]
        words += ["--max_new_tokens", "8", "--batch-size", "4", "--temperature", "1"]
        return Command(ROOT / "infer.py", *words)

    start("whole").finish()
    kill_and_finish(lambda: start("killed"), more_lines(tmp_path / "killed" / "a.jsonl"), times=3)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
