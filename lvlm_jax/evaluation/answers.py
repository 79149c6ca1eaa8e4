"""Reads and writes answer files in the benchmarks' own formats.

`AnswerFormat` is JSON lines `{question_id, prompt, text, model_id, image, metadata}`, as in LLaVA and VCD. It also
reads a JSON list, other column names, and more or fewer columns. A benchmark with other files defines its
own format in its module.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation.protocol import Protocol
from lvlm_jax.evaluation.question import Question

IDS = ("question_id", "image_id", "id", "index")
TEXTS = ("text", "caption", "response", "answer", "prediction")
ENDINGS = (".txt", ".json", ".jsonl")
BLOCK = 10_000_000
Answers = dict[tuple[str, str], str]  # Question.key -> text


@dataclasses.dataclass(frozen=True)
class AnswerRow:
    """One answer in a file, not yet matched to its question; fields that the file lacks are None.

    The question of a row is known from its id, or (as in MME) from group, prompt and image, or (as in POPE) from the
    place in the file and the prompt.

    Attributes:
        where: file and line, for messages.
        images: names of the images.
        place: index in the file, from 0.
        other: name of a second column that could be the answer.
        repeats: whether prompt and images, if present, must equal those of the question.
    """

    where: str
    id: str | None
    text: str
    group: str | None = None
    prompt: str | None = None
    images: tuple[str, ...] = ()
    place: int | None = None
    other: str | None = None
    repeats: bool = False


@dataclasses.dataclass(frozen=True)
class AnswerFormat:
    """How the answers to a benchmark are written and read.

    Attributes:
        name: name of the file or folder that a run writes. A file that ends in `.json` has one JSON list, others have
            JSON lines.
        by_group: whether a run over several of the protocol's groups writes one file per group, `GROUP.jsonl`.
        columns: the benchmark's own names for the columns of id and answer; they are written, and read before others.
        identity: converts an id in the file to that of the question.
        in_order: whether to accept rows `{question, answer}` without an id, in the order of the questions.
        repeats: whether a prompt contains the question unchanged, so that answers to another question are refused.
        blocks: groups that may share one file; their ids begin at 1, 10000001, 20000001, and so on, in this order.
    """

    name: str = "answers.jsonl"
    by_group: bool = False
    columns: tuple[str, ...] = ()
    identity: Callable[[str], str] = str
    in_order: bool = False
    repeats: bool = False
    blocks: tuple[str, ...] = ()

    def read(self, path: Path, group: str | None = None) -> list[AnswerRow]:
        """The rows of a file, which belongs to `group` if that is not None.

        Raises:
            LVLMError: the file is malformed, or an id is beyond the blocks.
        """
        rows = [
            self.row(entry, place, group, f"line {number} of answer file {str(path)!r}")
            for place, (number, entry) in enumerate(files.read_rows(path, "answer file"))
        ]
        if not self.blocks or not any(map(_block, rows)):
            return rows
        rows_of_blocks = [self._in_block(row) for row in rows]
        return rows_of_blocks if group is None else [row for row in rows_of_blocks if row.group == group]

    def _in_block(self, row: AnswerRow) -> AnswerRow:
        block = _block(row)
        if block >= len(self.blocks):
            raise LVLMError(f"{row.where}: id {row.id} is beyond the blocks of {', '.join(self.blocks)}")
        return dataclasses.replace(row, id=str(int(row.id) % BLOCK), group=self.blocks[block])

    def row(self, entry: dict, place: int, group: str | None, where: str) -> AnswerRow:
        """Makes a row of the object on line `place` of its file."""
        metadata = entry.get("metadata") if isinstance(entry.get("metadata"), dict) else {}
        own = entry.get("group") or metadata.get("group") or entry.get("category")
        if group and own in self.blocks and own != group:
            raise LVLMError(f"{where} says that it answers {own}, and is given as an answer to {group}")
        row_group = group or own
        row_group = row_group if isinstance(row_group, str) else None
        if self.in_order and "question" in entry and not entry.keys() & set(IDS):
            question, answer_text = (files.field(entry, [name], str, where) for name in ("question", "answer"))
            return AnswerRow(where, None, answer_text, row_group, question, place=place)
        texts = (*self.columns[1:], *TEXTS)
        identity = str(files.field(entry, (*self.columns[:1], *IDS), (int, str), where))
        text = files.field(entry, texts, str, where)
        present = [name for name in dict.fromkeys(texts) if name in entry]
        images = entry.get("image")
        images = images if isinstance(images, list) else [images]
        return AnswerRow(
            where,
            self.identity(identity),
            text,
            row_group,
            entry["prompt"] if isinstance(entry.get("prompt"), str) else None,
            tuple(name for name in images if isinstance(name, str)),
            other=present[1] if present[1:] else None,
            repeats=self.repeats,
        )

    def entry(self, question: Question, text: str, protocol: Protocol, model_id: str) -> dict:
        """The object that is written for one answer."""
        if self.columns:
            return dict(zip(self.columns, (question.id, text), strict=True))
        names = question.image_names
        return {
            "question_id": question.id,
            "prompt": protocol.prompt(question),
            "text": text,
            "model_id": model_id,
            "image": names[0] if len(names) == 1 else list(names),
            "metadata": {"group": question.group},
        }

    def write(
        self, path: Path, questions: Sequence[Question], answers: Mapping, protocol: Protocol, model_id: str = ""
    ) -> list[Path]:
        """Writes the answers to those questions that have one; each file is complete or absent.

        Args:
            path: the file to write (or a folder, if the format has several files), called `name`.

        Returns:
            The files.
        """
        entries = [
            self.entry(question, answers[question.key], protocol, model_id)
            for question in questions
            if question.key in answers
        ]
        if self.name.endswith(".json"):
            text = json.dumps(entries, ensure_ascii=False, indent=1) + "\n"
        else:
            text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        files.write_whole(path, text)
        return [path]


def _block(row: AnswerRow) -> int:
    """The number of the block of `AnswerFormat.blocks` to which the id belongs; 0 for ids that belong to no block."""
    return int(row.id) // BLOCK if row.id and row.id.isdecimal() and row.id.isascii() and len(row.id) < 10 else 0


def read(paths: Sequence[tuple[str | None, Path]], form: AnswerFormat, groups: Sequence[str]) -> list[AnswerRow]:
    """All rows of answer files, each with the group that the file belongs to (or None).

    Args:
        paths: (group, file or folder).
        form: the benchmark's format.
        groups: the groups of the protocol; a folder contains a file that is named after each group.

    Raises:
        LVLMError: a file is missing, empty or malformed.
    """
    rows = []
    for group, path in paths:
        path = files.expand(path)
        for file, of in _of_groups(path, groups) if path.is_dir() else [(path, group)]:
            rows += form.read(file, of)
    return rows


def _of_groups(folder: Path, groups: Sequence[str]) -> list[tuple[Path, str]]:
    """The files in a folder whose names contain the name of a group, each with its group."""
    entries = [path for path in sorted(folder.iterdir()) if path.suffix in ENDINGS]
    of_group = []
    for group in groups:
        # A "count" file is not a "counting" file; "random" matches coco_random_answers.jsonl.
        matches = [path for path in entries if path.stem == group] or [
            path for path in entries if group in path.stem.replace("-", "_").split("_")
        ]
        if len(matches) > 1:
            raise LVLMError(
                f"{' and '.join(path.name for path in matches)} in {str(folder)!r} both look like answers of {group}; "
                "name one file for each: GROUP=FILE"
            )
        of_group += [(path, group) for path in matches]
    if not of_group:
        raise LVLMError(f"answers folder {str(folder)!r} has no file named after one of {', '.join(groups)}")
    return of_group


def match(
    questions: Sequence[Question], rows: Sequence[AnswerRow], partial: bool = False, known: Sequence[str] = ()
) -> Answers:
    """Matches answers to questions.

    A row is matched by its group and id. Without a group it is matched by its id, and if several splits share that id,
    also by image and prompt. Rows without an id are matched by image and question, or by their order; then each must
    repeat its question.

    Args:
        partial: whether to leave out questions without an answer, instead of raising.
        known: groups of the protocol; answers in groups without questions are ignored.

    Raises:
        LVLMError: an answer belongs to no question, to several, or to one that already has an answer; it repeats
            another question; it is the question itself although another column may be the answer; or a question has no
            answer.
    """
    groups = {question.group for question in questions}
    others = set(known) - groups
    if rows and all(row.group in others for row in rows):
        raise LVLMError(
            f"all answers in {rows[0].where} are to {rows[0].group}; the questions are of {', '.join(sorted(groups))}"
        )
    rows = [row for row in rows if row.group not in others]
    by_id: dict[str, list[Question]] = {}
    by_text: dict[tuple, list[Question]] = {}
    by_place: dict[int, list[Question]] = {}
    sizes: Counter = Counter()
    for question in questions:
        by_id.setdefault(str(question.id), []).append(question)
        by_place.setdefault(sizes[question.group], []).append(question)
        sizes[question.group] += 1
        # Without the file ending, which is unknown if the images are not at hand.
        name = Path(question.unit).stem
        by_text.setdefault((question.group, name, question.text), []).append(question)
    matched: Answers = {}
    for row in rows:
        if row.place is not None:
            prompt = row.prompt.strip().lower()
            candidates = [one for one in by_place.get(row.place, []) if one.text.strip().lower() == prompt]
        elif row.id is None:
            candidates = by_text.get((row.group, Path(row.images[0]).stem, row.prompt), [])
        else:
            candidates = by_id.get(row.id, [])
        if row.group in groups:
            candidates = [question for question in candidates if question.group == row.group]
        if len(candidates) > 1 and row.place is None:
            candidates = [question for question in candidates if _same(question, row)]
        name = f"{'+'.join(row.images) or 'question'} {row.prompt!r}" if row.id is None else row.id
        if not candidates:
            raise LVLMError(f"{row.where}: {name} is none of the {len(questions)} questions; is it the right file?")
        if len(candidates) > 1:
            shared = ", ".join(question.group for question in candidates)
            raise LVLMError(f"{row.where}: id {name} occurs in {shared}; choose one with --group, or as GROUP=FILE")
        if row.repeats and not _same(candidates[0], row):
            row_text = " ".join(["", *(row.prompt or "").split()][:20] + list(row.images)).strip()
            raise LVLMError(
                f"{row.where}: question {row.id} of {candidates[0].group} is {candidates[0].text!r} about "
                f"{candidates[0].unit}, and this answers {row_text!r}; is it the file of another split?"
            )
        key = candidates[0].key
        if key in matched:
            raise LVLMError(f"{row.where}: {name} has two answers; every question must have one")
        if row.other and row.text.strip() == candidates[0].text.strip():
            raise LVLMError(
                f"{row.where}: the answer is the question itself; is it in {row.other}? Keep one of both columns"
            )
        matched[key] = row.text
    if not partial:
        complete(questions, matched)
    return matched


def complete(questions: Sequence[Question], answers: Answers) -> None:
    """Checks that every question has an answer.

    Raises:
        LVLMError: a question has no answer.
    """
    missing = [question for question in questions if question.key not in answers]
    if missing:
        raise LVLMError(
            f"{len(missing)} of {len(questions)} questions have no answer, first {missing[0].id} of "
            f"{missing[0].group}; complete the file, choose --group, or score the existing answers with --partial"
        )


def _same(question: Question, row: AnswerRow) -> bool:
    """Whether the images and the prompt of a row, if it has them, belong to the question."""
    # Without folders and endings: COCO's number occurs as .jpg and as .png.
    names = {Path(name).stem for name in question.image_names}
    if not all(Path(name).stem in names for name in row.images):
        return False
    return row.prompt is None or _bare(question.text) in _bare(row.prompt)


def _bare(text: str) -> str:
    return " ".join(text.lower().split())
