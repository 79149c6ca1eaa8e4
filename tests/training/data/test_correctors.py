"""Correctors: truth, files and functions; what is wrong with each is one line; a judge is never asked twice."""

import json

import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.training.data import pairs
from lvlm_jax.training.data.correctors import resolve
from tests.training.stand_in import prompt

RECORD = {"model": "stand-in"}


@pytest.fixture
def prompts(tmp_path):
    return [prompt(tmp_path, name, truth=f"truth of {name}") for name in "abc"]


@pytest.fixture
def texts():
    return {"a": "answer a", "b": "answer b", "c": "answer c"}


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """Writes a module with a corrector in the folder where the command runs; its name is `name`."""
    monkeypatch.chdir(tmp_path)

    def write(name, body):
        (tmp_path / f"{name}.py").write_text(f"def correct(prompt, answer):\n    {body}\n")
        return f"{name}:correct"

    return write


def test_truth(prompts, texts, tmp_path):
    corrector = resolve("pocket", prompts)
    found = pairs.correct(prompts, texts, corrector, tmp_path / "log", RECORD)
    assert found == {name: f"truth of {name}" for name in "abc"}
    assert not (tmp_path / "log").exists()
    with pytest.raises(LVLMError, match="needs the truth of every prompt, and d has none"):
        resolve("pocket", [*prompts, prompt(tmp_path, "d")])


def test_no_corrector_changes_nothing(prompts, texts, tmp_path):
    del texts["b"]  # could not be answered
    assert pairs.correct(prompts, texts, None, tmp_path / "log", RECORD) == texts


def test_file(prompts, texts, tmp_path):
    path = tmp_path / "fixed.jsonl"
    rows = [{"record": {"seed": 0}}, {"id": "b", "chosen": " better b ", "rejected": "as it was"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corrector = resolve(str(path), prompts)
    found = pairs.correct(prompts, texts, corrector, tmp_path / "log", RECORD)
    assert found == {"a": "answer a", "b": "better b", "c": "answer c"}


@pytest.mark.parametrize(
    "lines, message",
    [
        ("", "file of corrected answers .* is empty"),
        ('{"id": "x", "chosen": "y"}', "line 1 .*: x is the id of no prompt"),
        ('{"id": "a", "chosen": "y"}\n{"id": "a", "chosen": "z"}', "line 2 .*: id a occurs twice"),
        ('{"id": "a"}', "line 1 .* has no chosen"),
        ('{"id": "a", "chosen": null}', "chosen is None; expected a string"),
    ],
)
def test_bad_files(prompts, tmp_path, lines, message):
    (tmp_path / "fixed.jsonl").write_text(lines)
    with pytest.raises(LVLMError, match=message):
        resolve(str(tmp_path / "fixed.jsonl"), prompts)


def test_function(prompts, texts, tmp_path, judge):
    name = judge("judge_good", "return f'{prompt.id}, {prompt.text.strip()}, {answer}, {prompt.images[0].name}'")
    found = pairs.correct(prompts, texts, resolve(name, prompts), tmp_path / "log", RECORD)
    assert found["a"] == "a, What is a?, answer a, a_0.png"


def test_a_function_that_breaks_off_is_not_asked_again_what_it_has_answered(prompts, texts, tmp_path, judge):
    body = (
        "open('asked', 'a').write(prompt.id)\n"
        "    if prompt.id == 'c' and not __import__('os').path.exists('ready'):\n"
        "        raise OSError('no judge')\n"
        "    return answer + '!'"
    )
    corrector = resolve(judge("judge_breaks", body), prompts)
    with pytest.raises(LVLMError, match="failed at prompt c: OSError: no judge"):
        pairs.correct(prompts, texts, corrector, tmp_path / "log", RECORD)
    (tmp_path / "ready").touch()
    found = pairs.correct(prompts, texts, corrector, tmp_path / "log", RECORD)
    assert found == {name: f"answer {name}!" for name in "abc"}
    assert (tmp_path / "asked").read_text() == "abcc"
    with pytest.raises(LVLMError, match="begun with other settings \\(answers.model: 'stand-in', now 'other'\\)"):
        pairs.correct(prompts, texts, corrector, tmp_path / "log", {"model": "other"})


@pytest.mark.parametrize("result", ["None", "3", "[answer]"])
def test_a_function_must_return_a_string(prompts, texts, tmp_path, judge, result):
    name = judge(f"judge_{abs(hash(result))}", f"return {result}")
    with pytest.raises(LVLMError, match="returned .* for prompt a; expected a string"):
        pairs.correct(prompts, texts, resolve(name, prompts), tmp_path / "log", RECORD)


@pytest.mark.parametrize(
    "name, message",
    [
        ("nothing.jsonl", "corrector 'nothing.jsonl' is unknown, and there is no such file"),
        ("no_such_module:correct", "no_such_module cannot be imported \\(ModuleNotFoundError"),
        ("json:no_such_function", "there is no no_such_function in module json"),
    ],
)
def test_unknown_correctors(prompts, name, message):
    with pytest.raises(LVLMError, match=message):
        resolve(name, prompts)
