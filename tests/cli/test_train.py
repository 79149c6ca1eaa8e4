"""`lvlm train`: its help lists a config's fields; configs are found by name; faults of a config are one line."""

import functools

import pytest

from lvlm_jax.methods import as_method
from tests.cli.command import refuses, run
from tests.training import pair_sets

MINE = """\"\"\"Mine alone.\"\"\"
from lvlm_jax.training import settings
def get_config():
    config = settings.base('sft')
    config.batch = 3
    return config
"""


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_lists_the_fields_of_a_config(folder, monkeypatch, capsys):
    command = functools.partial(run, monkeypatch, capsys, "train")
    lines = command("--config", "flow_alignment", "--help")[1].splitlines()
    assert "  length = 512                          tokens of the longest sample, image tokens included" in lines
    assert any(line.startswith("  flow.omega = 4.0 ") and "SEVI" in line for line in lines)
    assert not any(line.startswith("  preference.") for line in lines)
    assert "  preference.method = 'capl' " in command("--help")[1]
    (folder / "mine.py").write_text(MINE)
    code, out, _ = command("--config=mine.py", "-h")
    assert code == 0 and "config mine.py: Mine alone." in out and "\n  batch = 3   " in out
    assert "\n  everything.steps = 2600\n" in command("--config", "pocket", "--help")[1]


@pytest.mark.parametrize(
    "name, message",
    [
        ("cpal", r"there is no config 'cpal'; did you mean capl\? \(or give the path of a file\)"),
        ("xyz", "there are capl, dpo, "),
        ("configs/xyz.py", "config 'configs/xyz.py' is not a file"),
    ],
)
def test_a_config_or_a_field_that_is_not_there(folder, monkeypatch, capsys, name, message):
    for words in (("--workdir", "w"), ("--help",)):
        refuses(monkeypatch, capsys, message, "train", "--config", name, *words)
    words = ("--config", "sft", "--workdir", "w", "--config.optimiser.peak=1")
    refuses(monkeypatch, capsys, r"did you mean optimizer.peak\?", "train", *words)
    assert not (folder / "w").exists()


@pytest.mark.slow
def test_a_learned_method_is_used_by_its_file(folder, monkeypatch, capsys, checkpoint):
    """Two steps of training write a method. Another command answers with it, differently than without it."""
    pair_sets.write(folder)
    config = {"model": checkpoint, "data": "pairs.jsonl", "steps": 2, "batch": 5, "length": 95, "optimizer.peak": 2.0}
    config |= {"learned.method": "vaf:start_layer=0,end_layer=none"}
    settings = [f"--config.{name}={value}" for name, value in config.items()]
    code, out, _ = run(monkeypatch, capsys, "train", "--config", "learned_method", "--workdir", "w", *settings)
    assert code == 0 and out.endswith("result written to w/method.safetensors\n")
    learned = as_method("learned:w/method.safetensors").members[0]
    assert len(set(map(float, learned.enhance.values))) == 2  # of two layers
    asked = ["infer", "--model", checkpoint, "--image", "0.png", "--prompt", "Who?", "--max-new-tokens", 12]
    answers = [run(monkeypatch, capsys, *asked, "--method", word)[:2]
               for word in ("none", "learned:w/method.safetensors")]  # fmt: skip
    assert [code for code, _ in answers] == [0, 0] and answers[0] != answers[1]
