"""Yes/no and one-word questions over several images: MIHBench (existence, count, identity) and the pocket world's.

MIHBench: JSON lines over val2014 and CO3D; existence 3 x 800 (random, popular, adversarial), count 800, identity 800.
The same reader takes its parquet edition, and any rows of `images` (or `image`), `question` (or `text`) and `label`;
kinds come from a column `task` or `kind`, else from the file's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import binary, folders, parsers, tables
from lvlm_jax.evaluation.choices import interleave
from lvlm_jax.evaluation.pope import LLAVA_SUFFIX
from lvlm_jax.evaluation.protocol import Protocol, register
from lvlm_jax.evaluation.question import Data, Question
from lvlm_jax.evaluation.scores import Scores, Tally, ratio

GROUPS = ("existence_random", "existence_popular", "existence_adversarial", "count", "identity")
PLACES = (".", "MIHBench", "mihbench", "data", "MIHBench/data", "questions")
IMAGE_PLACES = (*folders.COCO_IMAGES, "../images", "..")

register(
    Protocol("mihbench/strict", "mihbench", "existence, count, identity; one yes/no word counts (default)", "strict",
             16, suffix=LLAVA_SUFFIX, groups=GROUPS),
    Protocol("mihbench/official", "mihbench", "the same, with POPE's official parser", "official", 128,
             suffix=LLAVA_SUFFIX, groups=GROUPS),
    Protocol("mihbench/short", "mihbench", "any yes/no or one-word questions over images, by --question-file",
             "short", 16, suffix=LLAVA_SUFFIX),
)  # fmt: skip


def question_files(data: Data, protocol: Protocol) -> dict[str, list[Path]]:
    """The question file given, or the file of each kind: `existence_random.jsonl` and so on."""
    if data.question_file is not None:
        return {"questions": [files.given(data.question_file, "question file")]}
    if not protocol.groups:
        raise LVLMError(f"{protocol.name} needs the question file by name; give --question-file")
    unknown = set(data.groups) - set(protocol.groups)
    if unknown:
        raise LVLMError(
            f"MIHBench has no kind {sorted(unknown)[0]!r}; choose among {', '.join(protocol.groups)}"
        )
    wanted = [group for group in protocol.groups if not data.groups or group in data.groups]
    return {
        group: [
            folders.find(
                data, [group + end for end in (".jsonl", ".json", ".parquet")], PLACES, f"MIHBench {group}"
            )
        ]
        for group in wanted
    }


def read(data: Data, protocol: Protocol, need_images: bool = False) -> list[Question]:
    """The questions, each with its images in order.

    Raises:
      LVLMError: a file or (with `need_images`) a picture is missing, a row is malformed, an id occurs twice.
    """
    rows, seen = [], set()
    for role, (path,) in question_files(data, protocol).items():
        for number, row in tables.rows(path):
            where = f"row {number} of question file {str(path)!r}"
            cells = tables.as_list(
                files.field(row, ["images", "image"], (list, str, dict, bytes), where), where
            )
            text = files.field(row, ["question", "text", "query"], str, where)
            label = str(files.field(row, ["label", "answer", "gt"], (str, int), where)).strip()
            group = role if role != "questions" else str(row.get("kind") or row.get("task") or path.stem)
            identity = next((row[name] for name in ("question_id", "id", "index") if name in row), number)
            files.unique(seen, (group, str(identity)), where)
            if not label:
                raise LVLMError(f"{where} has an empty label")
            if not data.groups or group in data.groups:
                images = [tables.picture(cell, None, f"{where}: image") for cell in cells]
                rows.append((identity, images, text, label, group, where))
    if not rows:
        raise LVLMError(f"no question of {', '.join(data.groups)} in the files of {protocol.name}")
    names = [str(image) for row in rows for image in row[1] if isinstance(image, Path)]
    paths = folders.locate_images(data, names, IMAGE_PLACES, need_images, protocol.name) if names else {}
    questions = []
    for identity, images, text, label, group, where in rows:
        found = tuple(image if isinstance(image, bytes) else paths[str(image)] for image in images)
        text, found = interleave(text, found, where)
        questions.append(Question(identity, found, text, label, group))
    return questions


def prompt(question: Question, protocol: Protocol) -> str:
    """The text put to a model."""
    return protocol.prompt(question)


def bare(text: str) -> str:
    """A short answer without case, article, and full stop."""
    return re.sub(r"^(an?|the) |[.!]$", "", text.strip().lower())


def score(questions: Sequence[Question], answers: Mapping, protocol: Protocol) -> Scores:
    """For yes/no kinds the figures of POPE; for others how often the answer is the label, article and case aside.

    Under the parser "short" yes/no questions are parsed by "strict".
    """
    by_group: dict[str, list[Question]] = {}
    for question in questions:
        by_group.setdefault(question.group, []).append(question)
    binary_groups = [
        group for group, members in by_group.items() if all(q.label.lower() in ("yes", "no") for q in members)
    ]
    other_groups = [group for group in by_group if group not in binary_groups]
    parse = parsers.yes_no("strict" if protocol.parser == "short" else protocol.parser)
    tally, unparsed = Tally(), 0
    for question in questions:
        text = answers[question.key]
        if question.group in binary_groups:
            said = parse(text, binary.label_of(question))
            unparsed += said is None
            binary.count(tally, question, said)
        else:
            tally.correct[question.key] = bare(text) == bare(question.label)
            tally.add(question.unit, **{f"{question.group}/right": tally.correct[question.key]})
        tally.add(question.unit, asked=1, right=tally.correct[question.key], **{f"{question.group}/asked": 1})
    figures = {"accuracy": ratio(["right"], ["asked"])}
    figures |= binary.table(binary_groups)
    figures |= {f"{group}: accuracy": ratio([f"{group}/right"], [f"{group}/asked"]) for group in other_groups}
    names = ["asked", "right", *binary.names(binary_groups), *(f"{group}/right" for group in other_groups),
             *(f"{group}/asked" for group in by_group)]  # fmt: skip
    return tally.scores(names, figures, {"parser": protocol.parser, "unparsed": unparsed})
