"""Correctors of chosen answers: the truth that prompts carry, a file of corrected answers, or a function of the user's.

CAPL's chosen answers come from the model itself, so they are corrected before they are learned from
(arXiv 2603.07048 has a judge do it).
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
        correct: from a prompt and the model's answer to the text to learn from. An empty one leaves the prompt out.
        record: what decides the corrections, as JSON values.
        logged: whether corrections are worth keeping: a function may ask a judge that takes time or money.
    """

    correct: Callable[[Prompt, str], str]
    record: Mapping[str, Any]
    logged: bool = False


def resolve(name: str, prompts: Sequence[Prompt]) -> Corrector:
    """The corrector that a command line names.

    Args:
        name: "pocket", the path of a file, or "module:function".
        prompts: what will be corrected.

    Raises:
        LVLMError: no such corrector, prompts without a truth, or an unusable file or function.
    """
    if name == "pocket":
        return from_truth(prompts)
    if files.expand(name).is_file():
        return from_file(files.expand(name), prompts)
    if re.fullmatch(r"([A-Za-z_][\w.]*|.+\.py):[A-Za-z_][\w.]*", name):
        return from_function(name)
    raise LVLMError(f"corrector {name!r} is unknown, and there is no such file; expected {KINDS}")


def from_truth(prompts: Sequence[Prompt]) -> Corrector:
    """Every answer becomes the prompt's truth. `LVLMError` when a prompt has none."""
    for prompt in prompts:
        if prompt.truth is None:
            raise LVLMError(
                f"corrector pocket needs the truth of every prompt, and {prompt.id} has none; draw prompts with "
                "--pocket, or give their lines a field truth"
            )
    return Corrector(lambda prompt, answer: prompt.truth, {"kind": "truth"})


def from_file(path: Path, prompts: Sequence[Prompt]) -> Corrector:
    """Corrections from JSON lines `{id, chosen}`; an answer without a line stays as it is.

    `answers.jsonl` of a run, edited, is such a file (its first line, the record, is passed over).

    Raises:
        LVLMError: the file is malformed, corrects a prompt twice, or one that is not asked.
    """
    ids = {prompt.id for prompt in prompts}
    corrections: dict[str, str] = {}
    for number, row in files.read_rows(path, "file of corrected answers"):
        where = f"line {number} of file of corrected answers {str(path)!r}"
        if row.keys() == {"record"}:
            continue
        key = str(files.field(row, ("id",), (str, int), where))
        if key not in ids:
            raise LVLMError(f"{where}: {key} is the id of no prompt; is it the right file?")
        if key in corrections:
            raise LVLMError(f"{where}: id {key} occurs twice; every answer must have one correction")
        corrections[key] = files.field(row, ("chosen",), str, where)
    return Corrector(
        lambda prompt, answer: corrections.get(prompt.id, answer), {"kind": "file", "sha256": file_hash(path)}
    )


def from_function(name: str) -> Corrector:
    """A function of the user's, `function(prompt, answer) -> str`, by its name (`config_files.user_object`).

    Raises:
        LVLMError: the module cannot be imported or has no such function; from `correct`, when the function fails or
            returns something else than a string.
    """
    function = config_files.user_object(name, "corrector")
    if not callable(function):
        raise LVLMError(f"corrector {name!r} is a {type(function).__name__}; expected a function")

    def correct(prompt: Prompt, answer: str) -> str:
        try:
            corrected = function(prompt, answer)
        except Exception as error:  # the user's code may raise anything
            raise LVLMError(
                f"corrector {name!r} failed at prompt {prompt.id}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(corrected, str):
            raise LVLMError(
                f"corrector {name!r} returned {repr(corrected)[:60]} for prompt {prompt.id}; expected a string"
            )
        return corrected

    module = config_files.user_module(name, "corrector")
    source = getattr(module, "__file__", None)
    record = {"kind": "function", "name": name, "sha256": file_hash(source) if source else None}
    return Corrector(correct, record, logged=True)
