"""Protocols: everything that determines a score besides the model, under one name; and the record of a score.

Two people's figures for "POPE" differ because the question file, the prompt's suffix, the parser, the length limit or
the image list differ. A protocol fixes most of these, and the record hashes the rest.
"""

import dataclasses
import difflib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation.question import Question
from lvlm_jax.generation.questions import PLACEHOLDER
from lvlm_jax.journal.record import file_hash, method_record
from lvlm_jax.version import __version__

LLAVA_SUFFIX = "\nAnswer the question using a single word or phrase."


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a benchmark is asked and scored.

    Attributes:
        name: "benchmark/variant".
        benchmark: name of its benchmark, a key of `lvlm_jax.evaluation.BENCHMARKS`.
        about: one line of description.
        template: the prompt; `{question}` is replaced by the question's text, and `{images}` is the place of its images
            if they do not come first.
        suffix: text after the question.
        system: the system prompt; "" for none (the chat template may then add its own).
        parser: a name in `parsers.YES_NO`, "letter", "short" (the label's own words), "none" (descriptions), or for
            CHAIR a name in `chair_words.READINGS`.
        max_new_tokens, temperature, top_p: decoding; temperature 0 is greedy.
        truncate: for captions: "none", or "sentence" to drop the text after the last full stop.
        groups: the splits or subtasks to ask.
        synonym_list: for CHAIR: "official" keeps the list's errors (words that never match), "repaired" corrects them.
    """

    name: str
    benchmark: str
    about: str
    parser: str
    max_new_tokens: int
    template: str = "{question}"
    suffix: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    truncate: str = "none"
    groups: tuple[str, ...] = ()
    synonym_list: str = "official"
    system: str = ""

    def prompt(self, question: Question) -> str:
        """The text that the model receives."""
        # Not str.format: a question may contain braces.
        template = self.template.replace("{images}", PLACEHOLDER * len(question.images))
        return template.replace("{question}", question.text) + self.suffix


_PROTOCOLS: dict[str, Protocol] = {}


def register(*protocols: Protocol) -> None:
    """Registers protocols by name; each name can be used once."""
    for protocol in protocols:
        if protocol.name in _PROTOCOLS:
            raise ValueError(f"protocol {protocol.name!r} is registered already")
        _PROTOCOLS[protocol.name] = protocol


def names() -> list[str]:
    """Names of all protocols, benchmark by benchmark."""
    return list(_PROTOCOLS)


def get(name: str) -> Protocol:
    """The protocol called `name`; a benchmark's name alone means its first protocol, the default.

    Raises:
        LVLMError: there is no such protocol; the message lists similar names.
    """
    if name in _PROTOCOLS:
        return _PROTOCOLS[name]
    family = [known for known in _PROTOCOLS if known.split("/")[0] == name.split("/")[0]]
    if family and "/" not in name:
        return _PROTOCOLS[family[0]]
    close = family or difflib.get_close_matches(name, _PROTOCOLS, cutoff=0.4) or list(_PROTOCOLS)
    raise LVLMError(f"protocol {name!r} is unknown; choose one of {', '.join(close)}")


def files_hash(paths: Sequence[Path]) -> str:
    """SHA-256 of one file; SHA-256 of the sorted names and content hashes of several files."""
    if len(paths) == 1:
        return file_hash(paths[0])
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.parent.name}/{path.name}\0{file_hash(path)}\n".encode())
    return digest.hexdigest()


def image_list_hash(questions: Sequence[Question]) -> str:
    """SHA-256 of the distinct image names in the order of the questions, one per line (for encoded images, their
    hashes)."""
    distinct = dict.fromkeys(name for question in questions for name in question.image_names)
    return hashlib.sha256("".join(f"{name}\n" for name in distinct).encode()).hexdigest()


def record(
    protocol: Protocol,
    questions: Sequence[Question],
    files: Mapping[str, Sequence[Path]],
    *,
    model: str | None = None,
    model_sha256: str | None = None,
    revision: str | None = None,
    method: object | Mapping | None = None,
    seed: int | None = None,
    more: Mapping | None = None,
) -> dict:
    """The record of a score, as plain JSON values.

    Args:
        protocol: the protocol of the run, with overrides (`dataclasses.replace`).
        questions: the questions, in order.
        files: role -> files, from a benchmark's `question_files`.
        model: path or hub id, with `model_sha256` of its files or its `revision`.
        method: a method or its record; None without a method, or if it is unknown (answers of other programs).
        seed: seed of sampling.
        more: everything else that determines the figures (bootstrap seed, source of the images, ...).
    """
    images = {name for question in questions for name in question.image_names}
    return {
        "protocol": dataclasses.asdict(protocol) | {"groups": list(protocol.groups)},
        "questions": len(questions),
        "files": {
            role: {"name": paths[0].name if len(paths) == 1 else f"{len(paths)} files", "sha256": files_hash(paths)}
            for role, paths in files.items()
            if paths
        },
        "images": {"count": len(images), "list_sha256": image_list_hash(questions)},
        "model": {"name": model, "sha256": model_sha256, "revision": revision},
        "method": dict(method) if isinstance(method, Mapping) else method_record(method),
        "seed": seed,
        "version": __version__,
    } | dict(more or {})
