"""Answer files in the benchmarks' own formats, read from anybody and written for anybody.

answers.jsonl   lines `{question_id, prompt, text, model_id, image, metadata}` (LLaVA, VCD, and ours)
POPE            also lines `{question, answer}` in the order of the questions, as POPE's own scorer takes them
CHAIR           JSON lines or a JSON list of `{image_id, caption}`
AMBER           a JSON list of `{id, response}`
MME             a folder with one text file per subtask, of lines "image, tab, question, tab, truth, tab, answer"
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation.protocol import Protocol
from lvlm_jax.evaluation.question import Question

IDS = ("question_id", "image_id", "id", "index")
TEXTS = ("text", "caption", "response", "answer", "prediction")
# The benchmark's own columns, which go before the others.
OWN = {"chair": ("image_id", "caption"), "amber": ("id", "response")}
# COCO's number of an image, alone, with zeros before it, or in a file name.
_COCO_NAME = re.compile(r"(?:\w*_)?0*(\d+)(?:\.(?:jpg|jpeg|png))?", re.ASCII)
Answers = dict[tuple[str, str], str]  # Question.key -> text


@dataclasses.dataclass(frozen=True)
class Row:
    """One answer of a file, not yet matched to its question; what the file does not say is None.

    A row has an id, or (as MME's) group, prompt and image, or (as POPE's own) its place in the file and a prompt.

    Attributes:
        place: counted from 0.
        other: name of a second column that could be the answer.
    """

    where: str
    id: str | None
    text: str
    group: str | None = None
    prompt: str | None = None
    image: str | None = None
    place: int | None = None
    other: str | None = None


def read(paths: Sequence[tuple[str | None, Path]], protocol: Protocol) -> list[Row]:
    """All rows of answer files, each file given with the group it is for (or None).

    Raises:
        LVLMError: a file is missing, empty or malformed.
    """
    rows = []
    for group, path in paths:
        path = path.expanduser()
        if path.is_dir():
            rows += _read_folder(path, protocol)
        elif protocol.benchmark == "mme" and path.suffix == ".txt":
            rows += _read_mme(path, group or path.stem)
        else:
            rows += _read_json(path, group, protocol)
    return rows


def _read_folder(folder: Path, protocol: Protocol) -> list[Row]:
    """A folder with one file a group, the group standing in its name."""
    found = []
    for group in protocol.groups:
        entries = [path for path in sorted(folder.iterdir()) if path.suffix in (".txt", ".json", ".jsonl")]
        # A "count" file is not one of "counting"; "random" is found in coco_random_answers.jsonl.
        named = [path for path in entries if path.stem == group] or [
            path for path in entries if group in path.stem.replace("-", "_").split("_")
        ]
        if len(named) > 1:
            raise LVLMError(
                f"{' and '.join(path.name for path in named)} in {str(folder)!r} both look like answers of {group}; "
                "name one file for each: GROUP=FILE"
            )
        if named:
            path = named[0]
            found += _read_mme(path, group) if path.suffix == ".txt" else _read_json(path, group, protocol)
    if not found:
        raise LVLMError(
            f"answers folder {str(folder)!r} holds no file named after one of {', '.join(protocol.groups)}"
        )
    return found


def _read_mme(path: Path, task: str) -> list[Row]:
    rows = []
    for number, line in enumerate(files.read_text(path, "answer file").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of answer file {str(path)!r}"
        cells = line.rstrip("\r").split("\t")
        if len(cells) != 4:
            raise LVLMError(
                f"{where} has {len(cells)} cells; expected image, question, truth, answer between tabs"
            )
        rows.append(Row(where, None, cells[3], task, cells[1].strip(), cells[0].strip()))
    return rows


def _read_json(path: Path, group: str | None, protocol: Protocol) -> list[Row]:
    own = OWN.get(protocol.benchmark, ())
    ids, texts = (*own[:1], *IDS), (*own[1:], *TEXTS)
    rows = []
    for place, (number, row) in enumerate(files.read_rows(path, "answer file")):
        where = f"line {number} of answer file {str(path)!r}"
        metadata = row.get("metadata") if isinstance(row.get("metadata"), dict) else {}
        named = group or row.get("group") or metadata.get("group") or row.get("category")
        named = named if isinstance(named, str) else None
        if protocol.benchmark == "pope" and "question" in row and not row.keys() & set(IDS):
            asked, said = (files.field(row, [name], str, where) for name in ("question", "answer"))
            rows.append(Row(where, None, said, named, asked, place=place))
            continue
        identity = str(files.field(row, ids, (int, str), where))
        if protocol.benchmark == "chair" and (number_of := _COCO_NAME.fullmatch(identity)):
            identity = number_of[1]
        present = [name for name in dict.fromkeys(texts) if name in row]
        image = row.get("image")
        rows.append(
            Row(
                where,
                identity,
                files.field(row, texts, str, where),
                named,
                row["prompt"] if isinstance(row.get("prompt"), str) else None,
                image if isinstance(image, str) else None,
                other=present[1] if present[1:] else None,
            )
        )
    return rows


def match(questions: Sequence[Question], rows: Sequence[Row], partial: bool = False) -> Answers:
    """Answers by question.

    A row is matched by its group and id; without a group by its id, and where several splits share that, by its image
    and prompt. MME's rows are matched by image and question, those of POPE's own format by their order, in which
    each must repeat its question.

    Args:
        partial: leave questions without an answer out, instead of raising.

    Raises:
        LVLMError: an answer belongs to no question, to several, or to one that is answered already, or is the question
          itself beside another column that may be the answer; a question has none.
    """
    groups = {question.group for question in questions}
    by_id: dict[str, list[Question]] = {}
    by_text: dict[tuple, list[Question]] = {}
    by_place: dict[int, list[Question]] = {}
    sizes: Counter = Counter()
    for question in questions:
        by_id.setdefault(str(question.id), []).append(question)
        by_place.setdefault(sizes[question.group], []).append(question)
        sizes[question.group] += 1
        # Without the ending: where the pictures are not at hand, it is not known.
        name = Path(question.unit).stem
        by_text.setdefault((question.group, name, question.text), []).append(question)
    found: Answers = {}
    for row in rows:
        if row.place is not None:
            asked = row.prompt.strip().lower()
            candidates = [one for one in by_place.get(row.place, []) if one.text.strip().lower() == asked]
        elif row.id is None:
            candidates = by_text.get((row.group, Path(row.image).stem, row.prompt), [])
        else:
            candidates = by_id.get(row.id, [])
        if row.group in groups:
            candidates = [question for question in candidates if question.group == row.group]
        if len(candidates) > 1 and row.place is None:
            candidates = [question for question in candidates if _same(question, row)]
        name = f"{row.image or 'question'} {row.prompt!r}" if row.id is None else row.id
        if not candidates:
            raise LVLMError(
                f"{row.where}: {name} is none of the {len(questions)} questions; is it the right file?"
            )
        if len(candidates) > 1:
            shared = ", ".join(question.group for question in candidates)
            raise LVLMError(
                f"{row.where}: id {name} occurs in {shared}; say which is meant with --group, or as GROUP=FILE"
            )
        key = candidates[0].key
        if key in found:
            raise LVLMError(f"{row.where}: {name} is answered twice; every question must have one answer")
        if row.other and row.text.strip() == candidates[0].text.strip():
            raise LVLMError(
                f"{row.where}: the answer is the question itself; is it in {row.other}? Keep one of both columns"
            )
        found[key] = row.text
    missing = [question for question in questions if question.key not in found]
    if missing and not partial:
        raise LVLMError(
            f"{len(missing)} of {len(questions)} questions have no answer, first {missing[0].id} of "
            f"{missing[0].group}; complete the file, choose --group, or score what is there with --partial"
        )
    return found


def _same(question: Question, row: Row) -> bool:
    names = [Path(name).name for name in question.image_names]
    if row.image is not None and Path(row.image).name not in names:
        return False
    return row.prompt is None or row.prompt.startswith(question.text)


def write(
    path: Path, questions: Sequence[Question], answers: Mapping, protocol: Protocol, model_id: str = ""
) -> list[Path]:
    """Write answers in the format of the protocol's benchmark; each file is complete or absent.

    Args:
        path: the file; for MME a folder.

    Returns:
        What was written.
    """
    answered = [question for question in questions if question.key in answers]
    if protocol.benchmark == "mme":
        return _write_mme(path, answered, answers)
    if protocol.benchmark == "amber":
        entries = [{"id": question.id, "response": answers[question.key]} for question in answered]
        text = json.dumps(entries, ensure_ascii=False, indent=1) + "\n"
    elif protocol.benchmark == "chair":
        text = _lines({"image_id": question.id, "caption": answers[question.key]} for question in answered)
    else:
        text = _lines(
            {
                "question_id": question.id,
                "prompt": protocol.prompt(question),
                "text": answers[question.key],
                "model_id": model_id,
                "image": _image_names(question),
                "metadata": {"group": question.group},
            }
            for question in answered
        )
    files.write_whole(path, text)
    return [path]


def _lines(entries) -> str:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def _image_names(question: Question) -> str | list[str]:
    names = question.image_names
    return names[0] if len(names) == 1 else list(names)


def _write_mme(folder: Path, questions: Sequence[Question], answers: Mapping) -> list[Path]:
    by_task: dict[str, list[str]] = {}
    for question in questions:
        answer = " ".join(answers[question.key].split())  # a tab or line end would break the table
        line = "\t".join((question.unit, question.text, question.label.capitalize(), answer))
        by_task.setdefault(question.group, []).append(line + "\n")
    written = []
    for task, lines in by_task.items():
        written.append(folder / f"{task}.txt")
        files.write_whole(written[-1], "".join(lines))
    return written
