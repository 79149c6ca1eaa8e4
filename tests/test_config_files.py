"""A user's own objects by name: from the current folder, from a file, installed; what is wrong is one line."""

import dataclasses
import json
import sys

import pytest

from lvlm_jax.config_files import load_config, user_module, user_object
from tests.refusals import refused


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of the user's, which is the current one; modules from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    before, places = set(sys.modules), list(sys.path)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]
    assert sys.path == places


def write(folder, **modules):
    """Files with these contents; a double underscore stands for a slash."""
    for name, code in modules.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)


def loaded(name):
    return user_object(name, "method")


def test_a_module_of_the_current_folder(folder):
    code = "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass Mine:\n    alpha: float = 2.0\n"
    write(folder, mine_one=code + "    class Inner:\n        pass\n")
    mine = loaded("mine_one:Mine")
    assert dataclasses.asdict(mine()) == {"alpha": 2.0} and loaded("mine_one:Mine.Inner") is mine.Inner
    # By its file it is the same class: a module that registers something must not run twice.
    assert loaded("mine_one.py:Mine") is mine and loaded(f"{folder}/mine_one.py:Mine") is mine
    assert user_module("mine_one:Mine", "method").__file__ == str(folder / "mine_one.py")
    (folder / "mine_three").mkdir()
    (folder / "mine_three" / "__init__.py").write_text("")  # a package
    write(folder, mine_three__inner="from . import other\nvalue = other.value\n", mine_three__other="value = 7\n")
    assert loaded("mine_three.inner:value") == 7
    assert loaded("os.path:join")("a", "b") == "a/b"  # an installed one


def test_files_elsewhere(folder):
    """Files with modules beside them, two of the same name, and one with the name of a loaded module."""
    (folder / "else where").mkdir()
    (folder / "else where" / "mine_two.py").write_text(
        "from mine_two_helper import value\ndef f():\n    return value\n"
    )
    (folder / "else where" / "mine_two_helper.py").write_text("value = 5\n")
    finders = list(sys.meta_path)
    assert loaded("else where/mine_two.py:f")() == 5 and sys.meta_path == finders
    refused("there is no file mine_two.py in", loaded, "mine_two.py:f")
    write(folder, a__mine_four="value = 1\n", b__mine_four="value = 2\n", json="value = 3\n")
    assert [loaded(f"{name}/mine_four.py:value") for name in "abab"] == [1, 2, 1, 2]
    assert loaded("json:value") == 3 and json is sys.modules["json"] and json.loads("4") == 4


@pytest.mark.parametrize(
    "name, message",
    [
        ("absent_module:f", r"method 'absent_module:f': module absent_module cannot be imported "
         r"\(ModuleNotFoundError: .*\), and there is no absent_module.py in '"),
        ("absent.py:f", r"method 'absent.py:f': there is no file absent.py in '"),
        ("wrong_code:f", r"module wrong_code cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("wrong_code.py:f", r"file wrong_code.py cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("wrong_import:f", r"cannot be imported \(ModuleNotFoundError: No module named 'absent_neighbour'\)$"),
        ("os:absent", r"there is no absent in module os$"),
        ("os:path.absent", r"there is no path.absent in module os$"),
        ("os", r"method 'os' is not understood; expected module:name or path/file.py:name"),
        ("os:", r"is not understood"),
        (":f", r"is not understood"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(folder, name, message):
    write(folder, wrong_code="1 / 0\n", wrong_import="import absent_neighbour\n")
    refused(message, loaded, name)
    assert "wrong_code" not in sys.modules


def test_code_that_failed_is_run_again_when_it_is_repaired(folder):
    write(folder, mine_five="value = absent\n")
    refused("NameError", loaded, "mine_five:value")
    write(folder, mine_five="value = 'repaired now'\n")
    assert loaded("mine_five:value") == "repaired now"


def test_a_config_that_ends_the_process_is_an_error(tmp_path):
    for code in ("import sys; sys.exit(3)", "def get_config():\n    raise SystemExit", "exit()"):
        write(tmp_path, mine=code, theirs="raise SystemExit")
        refused("mine.py' failed: (SystemExit|KeyError)", load_config, tmp_path / "mine.py")
    refused("cannot be imported .SystemExit", loaded, f"{tmp_path / 'theirs.py'}:Method")
