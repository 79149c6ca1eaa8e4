"""`lvlm train`: its help lists a config's fields; configs by name; what is wrong with one is one line."""

import functools

import pytest

from tests.cli.command import run


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return functools.partial(run, monkeypatch, capsys, "train")


def test_help_lists_the_fields_of_a_config(command, tmp_path):
    _, out, _ = command("--config", "flow_alignment", "--help")
    lines = out.splitlines()
    assert "  length = 512                          tokens of the longest sample, image tokens included" in lines
    assert any(line.startswith("  flow.omega = 4.0 ") and "SEVI" in line for line in lines)
    assert not any(line.startswith("  preference.") for line in lines)
    _, out, _ = command("--help")
    assert "  preference.method = 'capl' " in out
    (tmp_path / "mine.py").write_text(
        '"""Mine alone."""\nfrom lvlm_jax.training import settings\n'
        "def get_config():\n    config = settings.base('sft')\n    config.batch = 3\n    return config\n"
    )
    code, out, _ = command("--config=mine.py", "-h")
    assert code == 0 and "config mine.py: Mine alone." in out and "\n  batch = 3   " in out
    _, out, _ = command("--config", "pocket", "--help")
    assert "\n  everything.steps = 2600\n" in out


@pytest.mark.parametrize(
    "name, message",
    [
        ("cpal", "there is no config 'cpal'; did you mean capl? (or give the path of a file)"),
        ("xyz", "there are capl, dpo, "),
        ("configs/xyz.py", "config 'configs/xyz.py' is not a file"),
    ],
)
def test_a_config_that_is_not_there(command, name, message):
    for words in (("--workdir", "w"), ("--help",)):
        code, out, error = command("--config", name, *words)
        assert (code, out) == (2, "") and error.startswith("lvlm train: ") and error.count("\n") == 1
        assert message in error


def test_a_field_that_is_not_there(command, tmp_path):
    code, _, error = command("--config", "sft", "--workdir", "w", "--config.optimiser.peak=1")
    assert code == 2 and error.count("\n") == 1 and "did you mean optimizer.peak?" in error
    assert not (tmp_path / "w").exists()
