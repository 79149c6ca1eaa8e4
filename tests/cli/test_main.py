"""`lvlm`: its commands and their help, the top level without JAX, unknown commands, shims, and the shipped configs."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from lvlm_jax.cli import main
from tests.cli.command import refuses, run

ROOT = pathlib.Path(__file__).parents[2]


def test_every_command_is_one_line_of_the_help(monkeypatch, capsys):
    for words in ((), ("--help",), ("-h",)):
        code, out, error = run(monkeypatch, capsys, *words)
        assert (code, error) == (0, "")
        for name, about in main.COMMANDS.items():
            (line,) = re.findall(rf"^  {name} +(.*)$", out, re.MULTILINE)
            assert line == about


def test_every_file_is_a_command():
    files = {path.stem for path in (ROOT / "lvlm_jax" / "cli").glob("*.py")}
    names = {name.replace("-", "_") for name in main.COMMANDS}
    assert files == names | {"__init__", "main", "common", "habits", "demo", "demo_card"}


@pytest.mark.parametrize("name", main.COMMANDS)
def test_each_command(monkeypatch, capsys, name):
    """A command's help, its answer to an unknown flag, and its shim in the clone."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    code, out, error = run(monkeypatch, capsys, name, "--help")
    assert (code, error) == (0, "")
    assert out.startswith(f"usage: lvlm {name} ")
    assert re.search(rf"^ +lvlm {name}( |$)", out, re.MULTILINE), "no example"
    assert not re.search(r"^ +lvlm .*( lvlm [a-z]| {3,}--)", out, re.MULTILINE), "two example lines in one"
    assert not re.search(r"python |tools/|\b(?<!configs/)(infer|train)\.py", out)
    refuses(monkeypatch, capsys, "", name, "--such-a-flag-there-is-none")
    folder = ROOT if name in ("infer", "train") else ROOT / "tools"
    text = (folder / f"{name.replace('-', '_')}.py").read_text()
    assert f'run("{name}")' in text and text.count("\n") < 8


def test_an_unknown_command_is_one_line(monkeypatch, capsys):
    hints = {"infre": "did you mean infer?", "pocket-wrld": "did you mean pocket-world?", "xyz": "lvlm --help"}
    for word, hint in hints.items():
        code, out, error = run(monkeypatch, capsys, word)
        assert (code, out) == (2, "")
        assert error.startswith(f"lvlm: '{word}' is not a command; ") and hint in error and error.count("\n") == 1


def test_the_top_level_imports_no_jax():
    """`lvlm --help`, `lvlm --version` and a mistyped command answer at once."""
    code = (
        "import sys\nfrom lvlm_jax.cli import main\nsys.argv = ['lvlm', *sys.argv[1:]]\n"
        "try:\n    main.main()\nexcept SystemExit:\n    print('jax' in sys.modules, 'numpy' in sys.modules)\n"
    )
    for word in ("--help", "--version", "infre"):
        command = [sys.executable, "-c", code, word]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "False False", done.stderr


def test_as_a_module_and_from_the_clone(tmp_path):
    """Every way to call a command says the same."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def call(*words):
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    for words in (["-m", "lvlm_jax", "report"], [ROOT / "tools" / "report.py"]):
        done = call(*words, "nowhere")
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("lvlm report: 'nowhere' is not a folder") and done.stderr.count("\n") == 1


def test_the_import_path_is_left_alone():
    for path in (*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "lvlm_jax").rglob("*.py")):
        assert "sys.path" not in path.read_text(), path


@pytest.mark.parametrize("words", [("infer",), ("sweep", "--method", "cmac", "--grid", "alpha=0,1")])
def test_addresses_are_downloaded_where_the_user_allows_it(words, monkeypatch, capsys):
    words = [*words, "--image", "http://127.0.0.1:1/a.png", "--prompt", "What?"]
    refuses(monkeypatch, capsys, "give --allow-urls", *words)
    refuses(monkeypatch, capsys, "cannot be downloaded", *words, "--allow-urls")
