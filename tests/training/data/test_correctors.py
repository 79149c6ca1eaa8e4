"""Correctors: truth, files and functions; faults of each are one line; a judge is never asked twice."""

import json

import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.training.data import pairs
from lvlm_jax.training.data.correctors import resolve
from tests.training.stand_in import prompt

RECORD = {"model": "stand-in"}
TEXTS = {name: f"answer {name}" for name in "abc"}


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return [prompt(tmp_path, name, truth=f"truth of {name}") for name in "abc"]


@pytest.fixture
def correct(prompts, tmp_path):
    return lambda corrector, texts=TEXTS, record=RECORD, log="log": pairs.correct(
        prompts, texts, corrector, tmp_path / log, record
    )


@pytest.fixture
def judge(prompts, tmp_path):
    """Writes a module with a corrector in the folder where the command runs."""

    def write(name, body):
        (tmp_path / f"{name}.py").write_text(f"def correct(prompt, answer):\n    {body}\n")
        return resolve(f"{name}:correct", prompts)

    return write


def test_truth(prompts, correct, tmp_path):
    assert correct(resolve("pocket", prompts)) == {name: f"truth of {name}" for name in "abc"}
    assert not (tmp_path / "log").exists()
    with pytest.raises(LVLMError, match="needs the truth of every prompt, and d has none"):
        resolve("pocket", [*prompts, prompt(tmp_path, "d")])
    answered = {name: TEXTS[name] for name in "ac"}  # b could not be answered
    assert correct(None, answered) == answered


def test_file(prompts, correct, tmp_path):
    rows = [{"record": {"seed": 0}}, {"id": "b", "chosen": " better b ", "rejected": "as it was"}]
    (tmp_path / "fixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert correct(resolve("fixed.jsonl", prompts)) == TEXTS | {"b": "better b"}


@pytest.mark.parametrize(
    "lines, message",
    [
        ("", "file of corrected answers .* is empty"),
        ('{"id": "x", "chosen": "y"}', "line 1 .*: there is no prompt with the id x"),
        ('{"id": "a", "chosen": "y"}\n{"id": "a", "chosen": "z"}', "line 2 .*: id a occurs twice"),
        ('{"id": "a"}', "line 1 .* has no chosen"),
        ('{"id": "a", "chosen": null}', "chosen is None; expected a string"),
    ],
)
def test_bad_files(prompts, tmp_path, lines, message):
    (tmp_path / "fixed.jsonl").write_text(lines)
    with pytest.raises(LVLMError, match=message):
        resolve(str(tmp_path / "fixed.jsonl"), prompts)


def test_function(correct, judge):
    good = judge("judge_good", "return f'{prompt.id}, {prompt.text.strip()}, {answer}, {prompt.images[0].name}'")
    assert correct(good)["a"] == "a, What is a?, answer a, a_0.png"
    for number, result in enumerate(("None", "3", "[answer]")):
        with pytest.raises(LVLMError, match="returned .* for prompt a; expected a string"):
            correct(judge(f"judge_{number}", f"return {result}"), log=str(number))


def test_a_function_that_breaks_off_is_not_asked_again_what_it_has_answered(correct, tmp_path, judge):
    body = (
        "open('asked', 'a').write(prompt.id)\n"
        "    if prompt.id == 'c' and not __import__('os').path.exists('ready'):\n"
        "        raise OSError('no judge')\n"
        "    return answer + '!'"
    )
    corrector = judge("judge_breaks", body)
    with pytest.raises(LVLMError, match="failed at prompt c: OSError: no judge"):
        correct(corrector)
    (tmp_path / "ready").touch()
    assert correct(corrector) == {name: f"answer {name}!" for name in "abc"}
    assert (tmp_path / "asked").read_text() == "abcc"
    with pytest.raises(LVLMError, match="begun with other settings \\(answers.model: 'stand-in', now 'other'\\)"):
        correct(corrector, record={"model": "other"})


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
