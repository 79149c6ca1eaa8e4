"""A grid of strengths of one method: its points, the answers at each point, and how they differ from greedy answers."""

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation.questions import conversation, read_questions
from lvlm_jax.journal.progress import Progress
from lvlm_jax.methods import Method
from lvlm_jax.methods.learned import name_of
from lvlm_jax.processors.images import in_folder

Point = Mapping[str, float]  # strength -> value

_YES_OR_NO = re.compile(r"\b(yes|no)\b")


def points(method: Method, axes: Sequence[str]) -> list[Point]:
    """The product of the axes `name=a,b,…`, as strengths of `method`.

    Raises:
        LVLMError: an axis is not a list of numbers or is not a strength of the method, or a value is out of range.
    """
    names = strengths(method)
    values = {}
    for axis in axes:
        name, _, text = axis.partition("=")
        name = name.replace("-", "_")
        if name not in names:
            raise LVLMError(
                f"--grid {axis}: {method.label} has no strength {name!r}; expected one of {', '.join(names)}"
            )
        try:
            values[name] = [float(one) for one in text.split(",")]
        except ValueError as error:
            raise LVLMError(f"--grid {axis}: expected numbers, as in {name}=0,0.5,1") from error
    grid = [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
    for point in grid:
        at(method, point)  # refuses values out of range before a model is loaded
    return grid


def strengths(method: Method) -> dict[str, tuple[int, str]]:
    """Name -> (index of the member, field) of every strength; names that several members have are as "vaf.enhance"."""
    members = getattr(method, "members", (method,))
    fields = [
        (index, field.name)
        for index, member in enumerate(members)
        for field in dataclasses.fields(member)
        if "low" in field.metadata
    ]
    names = [name for _, name in fields]
    by_name = {name: (index, name) for index, name in fields if names.count(name) == 1}
    if len(members) > 1:
        by_name |= {f"{name_of(members[index])}.{name}": (index, name) for index, name in fields}
    return by_name


def at(method: Method, point: Point) -> Method:
    """The method at a point of its grid.

    Raises:
        LVLMError: a strength is out of range.
    """
    fields, members = strengths(method), list(getattr(method, "members", (method,)))
    for name, value in point.items():
        index, field = fields[name]
        members[index] = dataclasses.replace(members[index], **{field: value})
    return dataclasses.replace(method, members=tuple(members)) if hasattr(method, "members") else members[0]


@dataclasses.dataclass(frozen=True)
class GridQuestion:
    """A question for the model: its id, the conversation, and the right answer ("yes" or "no") if known."""

    id: Any
    messages: list[dict]
    label: str | None = None


def of_prompts(texts: Sequence[str], images: Sequence[str]) -> list[GridQuestion]:
    """Questions about the same images; their ids are numbers from 0."""
    return [GridQuestion(number, conversation(images, text)) for number, text in enumerate(texts)]


def of_file(path: str, image_folder: str, limit: int | None = None) -> list[GridQuestion]:
    """The first `limit` questions of a question file (`generation.questions`); all without a limit.

    Raises:
        LVLMError: an unreadable file or line.
    """
    questions, wrong = read_questions(path)
    if wrong:
        line, reason = next(iter(wrong.items()))
        raise LVLMError(f"{path}, line {line}: {reason}")
    lines = files.read_text(Path(path), "question file").split("\n")
    entries = {number: json.loads(line) for number, line in enumerate(lines, 1) if line.strip()}
    labels = {number: str(entry["label"]).lower() for number, entry in entries.items() if "label" in entry}
    folder = Path(image_folder)
    return [
        GridQuestion(
            one.question_id,
            conversation([in_folder(folder, name) for name in one.image_names], one.text),
            labels.get(one.line),
        )
        for one in questions[:limit]
    ]


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers to all questions: greedy texts; and for each point of the grid, texts and their lengths in tokens."""

    greedy: list[str]
    texts: list[list[str]]
    lengths: list[list[int]]


def answer(
    model: Any,
    questions: Sequence[GridQuestion],
    method: Method,
    grid: Sequence[Point],
    batch_size: int,
    points_at_once: int,
    max_new_tokens: int,
) -> Answers:
    """Answers all questions greedily without the method, and with it at every point of the grid.

    Args:
        model: an `LVLM`.
        batch_size: number of questions that are answered together.
        points_at_once: number of points of the grid that are computed together.

    Raises:
        LVLMError: a strength out of range, an unreadable image, or a prompt that is too long.
    """
    settings = [at(method, point) for point in grid]
    answers = Answers([], [[] for _ in grid], [[] for _ in grid])
    with Progress(len(questions), title="questions", quiet=len(questions) <= batch_size) as progress:
        for start in range(0, len(questions), batch_size):
            messages = [one.messages for one in questions[start : start + batch_size]]
            answers.greedy.extend(model.generate(messages, max_new_tokens=max_new_tokens).text)
            for first in range(0, len(grid), points_at_once):
                outputs = model.sweep(messages, settings[first : first + points_at_once], max_new_tokens)
                for index, output in enumerate(outputs, first):
                    answers.texts[index].extend(output.text)
                    answers.lengths[index].extend(map(len, output.tokens))
            progress.update(len(messages))
    return answers


def table(questions: Sequence[GridQuestion], grid: Sequence[Point], answers: Answers) -> str:
    """One line per point: the share of answers that are not the greedy ones, the mean length in tokens, the accuracy.

    The accuracy is that of the first "yes" or "no" of an answer, if questions have such labels. The last line gives the
    number of questions and images.
    """
    labels = [one.label for one in questions]
    rows = [["settings", "changed", "tokens", "accuracy"], ["greedy", "", "", _accuracy(answers.greedy, labels)]]
    for point, texts, lengths in zip(grid, answers.texts, answers.lengths, strict=True):
        share = sum(a != b for a, b in zip(texts, answers.greedy, strict=True)) / len(texts)
        name = " ".join(f"{key}={value:g}" for key, value in point.items())
        rows.append([name, f"{share:.3f}", f"{sum(lengths) / len(lengths):.1f}", _accuracy(texts, labels)])
    rows = [row[: 4 if any(line[3] for line in rows[1:]) else 3] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    parts = (part for one in questions for message in one.messages for part in message["content"])
    images = {str(part["image"]) for part in parts if part["type"] == "image"}
    return "\n".join([*lines, f"questions {len(questions)}, images {len(images)}"])


def write(path: Path, questions: Sequence[GridQuestion], grid: Sequence[Point], answers: Answers) -> None:
    """Writes every answer, as JSON lines `{settings, question_id, text}`.

    Raises:
        LVLMError: the file cannot be written.
    """
    rows = [
        {"settings": point, "question_id": one.id, "text": text}
        for point, texts in zip(grid, answers.texts, strict=True)
        for one, text in zip(questions, texts, strict=True)
    ]
    files.write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def yes_or_no(text: str) -> str | None:
    """The first "yes" or "no" of an answer."""
    match = _YES_OR_NO.search(text.lower())
    return match and match[1]


def _accuracy(texts: list[str], labels: list[str | None]) -> str:
    pairs = [(yes_or_no(text), label) for text, label in zip(texts, labels, strict=True) if label in ("yes", "no")]
    return f"{sum(a == b for a, b in pairs) / len(pairs):.3f}" if pairs else ""
