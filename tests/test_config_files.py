"""A user's own objects by name: from the current folder, from a file, installed; what is wrong is one line."""

import dataclasses
import sys

import pytest

from lvlm_jax.config_files import load_config, user_module, user_object
from lvlm_jax.errors import LVLMError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of the user's, which is the current one; modules from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    before, places = set(sys.modules), list(sys.path)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]
    assert sys.path == places


def test_a_module_of_the_current_folder(folder):
    (folder / "mine_one.py").write_text(
        "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass Mine:\n    alpha: float = 2.0\n"
        "    class Inner:\n        pass\n"
    )
    mine = user_object("mine_one:Mine", "method")
    assert dataclasses.asdict(mine()) == {"alpha": 2.0}
    assert user_object("mine_one:Mine.Inner", "method") is mine.Inner
    # By its file it is the same class: a module that registers something must not run twice.
    assert user_object("mine_one.py:Mine", "method") is mine
    assert user_object(f"{folder}/mine_one.py:Mine", "method") is mine
    assert user_module("mine_one:Mine", "method").__file__ == str(folder / "mine_one.py")


def test_a_file_elsewhere_with_its_neighbours(folder, monkeypatch):
    elsewhere = folder / "else where"
    elsewhere.mkdir()
    (elsewhere / "mine_two.py").write_text("from mine_two_helper import value\ndef f():\n    return value\n")
    (elsewhere / "mine_two_helper.py").write_text("value = 5\n")
    finders = list(sys.meta_path)
    assert user_object("else where/mine_two.py:f", "method")() == 5
    assert sys.meta_path == finders
    with pytest.raises(LVLMError, match="there is no file mine_two.py in"):
        user_object("mine_two.py:f", "method")


def test_a_package_of_the_current_folder(folder):
    (folder / "mine_three").mkdir()
    (folder / "mine_three" / "__init__.py").write_text("")
    (folder / "mine_three" / "inner.py").write_text("from . import other\nvalue = other.value\n")
    (folder / "mine_three" / "other.py").write_text("value = 7\n")
    assert user_object("mine_three.inner:value", "method") == 7


def test_two_files_of_one_name_and_a_file_named_like_a_loaded_module(folder):
    for name, value in (("a", 1), ("b", 2)):
        (folder / name).mkdir()
        (folder / name / "mine_four.py").write_text(f"value = {value}\n")
    assert [user_object(f"{name}/mine_four.py:value", "method") for name in "abab"] == [1, 2, 1, 2]
    (folder / "json.py").write_text("value = 3\n")
    assert user_object("json:value", "method") == 3
    import json

    assert json is sys.modules["json"] and json.loads("4") == 4


def test_an_installed_module(folder):
    assert user_object("os.path:join", "method")("a", "b") == "a/b"


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
    (folder / "wrong_code.py").write_text("1 / 0\n")
    (folder / "wrong_import.py").write_text("import absent_neighbour\n")
    with pytest.raises(LVLMError, match=message) as caught:
        user_object(name, "method")
    assert "\n" not in str(caught.value)
    assert "wrong_code" not in sys.modules


def test_code_that_failed_is_run_again_when_it_is_repaired(folder):
    (folder / "mine_five.py").write_text("value = absent\n")
    with pytest.raises(LVLMError, match="NameError"):
        user_object("mine_five:value", "method")
    (folder / "mine_five.py").write_text("value = 'repaired now'\n")
    assert user_object("mine_five:value", "method") == "repaired now"


@pytest.mark.parametrize("code", ["import sys; sys.exit(3)", "def get_config():\n    raise SystemExit", "exit()"])
def test_a_config_that_ends_the_process_is_an_error(code, tmp_path):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(LVLMError, match="mine.py' failed: (SystemExit|KeyError)"):
        load_config(tmp_path / "mine.py")
    (tmp_path / "theirs.py").write_text("raise SystemExit")
    with pytest.raises(LVLMError, match="cannot be imported .SystemExit"):
        user_object(f"{tmp_path / 'theirs.py'}:Method", "method")
