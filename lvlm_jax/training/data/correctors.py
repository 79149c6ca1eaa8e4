"""Correctors of chosen answers: the prompts' right answers, a file of corrected answers, or a user's function.

CAPL's chosen answers come from the model itself, so they are corrected before training (arXiv 2603.07048 uses a judge).
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lvlm_jax import config_files, files
from lvlm_jax.errors import LVLMError
from lvlm_jax.journal.record import file_hash
from lvlm_jax.training.data.prompts import Prompt

KINDS = "pocket, a file of corrected answers, module:function, or file.py:function"


@dataclasses.dataclass(frozen=True)
class Corrector:
    """How chosen answers are corrected.

    Attributes:
        correct: maps a prompt and the model's answer to the text to learn. An empty text leaves the prompt out.
        record: everything that determines the corrections, as JSON values.
        logged: whether to log corrections: a function may call a judge that takes time or money.
    """

    correct: Callable[[Prompt, str], str]
    record: Mapping[str, Any]
    logged: bool = False


def resolve(name: str, prompts: Sequence[Prompt]) -> Corrector:
    """The corrector that a command line names.

    Args:
        name: "pocket", the path of a file, "module:function" or "file.py:function".
        prompts: the prompts whose answers will be corrected.

    Raises:
        LVLMError: there is no such corrector, a prompt has no truth, or the file or function cannot be used.
    """
    if name == "pocket":
        return from_truth(prompts)
    if files.expand(name).is_file():
        return from_file(files.expand(name), prompts)
    if re.fullmatch(r"([A-Za-z_][\w.]*|.+\.py):[A-Za-z_][\w.]*", name):
        return from_function(name)
    raise LVLMError(f"corrector {name!r} is unknown, and there is no such file; expected {KINDS}")


def from_truth(prompts: Sequence[Prompt]) -> Corrector:
    """A corrector that replaces every answer by `Prompt.truth`. Raises `LVLMError` if a prompt has no truth."""
    for prompt in prompts:
        if prompt.truth is None:
            raise LVLMError(
                f"corrector pocket needs the truth of every prompt, and {prompt.id} has none; draw prompts with "
                "--pocket, or give their lines a field truth"
            )
    return Corrector(lambda prompt, answer: prompt.truth, {"kind": "truth"})


def from_file(path: Path, prompts: Sequence[Prompt]) -> Corrector:
    """A corrector that reads its corrections from JSON lines `{id, chosen}`; other answers do not change.

    An edited `answers.jsonl` of a run is such a file (its first line, the record, is skipped).

    Raises:
        LVLMError: the file is malformed, corrects a prompt twice, or corrects an unknown prompt.
    """
    ids = {prompt.id for prompt in prompts}
    corrections: dict[str, str] = {}
    for number, row in files.read_rows(path, "file of corrected answers"):
        line_name = f"line {number} of file of corrected answers {str(path)!r}"
        if row.keys() == {"record"}:
            continue
        key = str(files.field(row, ("id",), (str, int), line_name))
        if key not in ids:
            raise LVLMError(f"{line_name}: there is no prompt with the id {key}; is it the right file?")
        if key in corrections:
            raise LVLMError(f"{line_name}: id {key} occurs twice; every answer must have one correction")
        corrections[key] = files.field(row, ("chosen",), str, line_name)
    return Corrector(
        lambda prompt, answer: corrections.get(prompt.id, answer), {"kind": "file", "sha256": file_hash(path)}
    )


def from_function(name: str) -> Corrector:
    """A corrector that calls a user's function `(prompt, answer) -> str`; `name` as for `config_files.user_object`.

    Raises:
        LVLMError: the module cannot be imported or has no such function; in `correct`, the function fails or does not
            return a string.
    """
    function = config_files.user_object(name, "corrector")
    if not callable(function):
        raise LVLMError(f"corrector {name!r} is a {type(function).__name__}; expected a function")

    def correct(prompt: Prompt, answer: str) -> str:
        try:
            text = function(prompt, answer)
        except Exception as error:  # the user's code may raise anything
            raise LVLMError(
                f"corrector {name!r} failed at prompt {prompt.id}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(text, str):
            raise LVLMError(f"corrector {name!r} returned {repr(text)[:60]} for prompt {prompt.id}; expected a string")
        return text

    module = config_files.user_module(name, "corrector")
    source = getattr(module, "__file__", None)
    record = {"kind": "function", "name": name, "sha256": file_hash(source) if source else None}
    return Corrector(correct, record, logged=True)
