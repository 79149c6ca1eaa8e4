"""Multiple choice with one image or many: BLINK, MUIRBench, NLVR2, Q-Bench2, MIRB, MIBench.

One reader reads three formats (a VLMEvalKit TSV, a Hugging Face folder of parquet files, JSON lines) with their
different column names; text and images may be interleaved. Answers are option letters.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import folders, parsers, tables
from lvlm_jax.evaluation.benchmark import Benchmark
from lvlm_jax.evaluation.parsers import LETTERS
from lvlm_jax.evaluation.protocol import Protocol
from lvlm_jax.evaluation.question import Data, Question, listed_name
from lvlm_jax.evaluation.scores import Figure, Scores, Tally, ratio

# Benchmark -> beginnings of its file names, in lower case.
FILES = {
    "blink": ("blink",),
    "muirbench": ("muirbench",),
    "nlvr2": ("nlvr2",),
    "qbench2": ("qbench2", "q-bench2", "q_bench2"),
    "mirb": ("mirb",),
    "mibench": ("mibench",),
}
SUFFIX = "\nAnswer with the option's letter from the given choices directly."
# One benchmark's question_id is another's index.
IDS, TEXTS, ANSWERS = (
    ("question_id", "index", "idx", "id"),
    ("question", "text", "query", "sentence"),
    ("answer", "label", "correct_choice", "gt"),
)
OPTIONS, GROUPS = ("options", "choices", "choice_list"), ("category", "sub_task", "task", "kind")
IMAGES = ("images", "image_list", "image_path", "image", "image_paths")


def _protocol(name: str, about: str) -> Protocol:
    return Protocol(f"choices/{name}", "choices", about, "letter", 16, suffix=SUFFIX)


PROTOCOLS = (
    *(_protocol(name, f"{name}: letter of the right option") for name in FILES),
    _protocol("any", "any table of multiple choice, by --question-file"),
)


def question_files(data: Data, protocol: Protocol) -> dict[str, list[Path]]:
    """The table that the user names; or the benchmark's TSV, JSON lines, or parquet files in the data folder."""
    if data.question_file is not None:
        return {"questions": [files.existing_file(data.question_file, "question file")]}
    folder, name = folders.data_folder(data), protocol.name.split("/")[1]
    if name not in FILES:
        raise LVLMError("choices/any needs the question file by name; give --question-file")
    beginnings = FILES[name]
    for place in (folder, folder / "LMUData", folder / "data"):
        entries = sorted(place.iterdir()) if place.is_dir() else []
        matching = [entry for entry in entries if entry.name.lower().startswith(beginnings)]
        tables_found = [entry for entry in matching if entry.is_file() and entry.suffix in tables.ENDINGS]
        parquet_files = [path for entry in matching if entry.is_dir() for path in sorted(entry.rglob("*.parquet"))]
        if len(tables_found) > 1 and {path.suffix for path in tables_found} != {".parquet"}:
            raise LVLMError(
                f"{len(tables_found)} files fit {protocol.name} in {str(place)!r}: "
                f"{', '.join(path.name for path in tables_found)}; "
                "choose one with --question-file"
            )
        if tables_found or parquet_files:
            return {"questions": tables_found or parquet_files}
    if folder.name.lower().startswith(beginnings) and (parquet_of_folder := sorted(folder.rglob("*.parquet"))):
        return {"questions": parquet_of_folder}
    raise LVLMError(
        f"{protocol.name} is missing: no {beginnings[0]}*.tsv, {beginnings[0]}*.jsonl or folder {beginnings[0]}*/ with "
        f"parquet files in {str(folder)!r}"
    )


def read(data: Data, protocol: Protocol, need_images: bool = False) -> list[Question]:
    """The questions with their options below them, and each `<image>` at its place.

    Raises:
        LVLMError: a file is missing, a row is malformed, an id occurs twice, or an answer is not one of the options.
    """
    questions, keys = [], set()
    for path in question_files(data, protocol)["questions"]:
        folder = data.image_folder or path.parent
        by_index: dict[str, str] = {}
        for number, row in tables.rows(path):
            where = f"row {number} of question file {str(path)!r}"
            _follow_reference(row, by_index, where)
            question = _question(row, number, folder, where)
            files.unique(keys, question.key, where)
            questions.append(question)
    groups = folders.chosen_groups(data, list(dict.fromkeys(one.group for one in questions)), protocol.name)
    questions = [question for question in questions if question.group in groups]
    if need_images:
        for question in questions:
            for image in question.images:
                if isinstance(image, Path) and not image.is_file():
                    raise LVLMError(f"image {str(image)!r} of question {question.id} is missing")
    return questions


def _follow_reference(row: dict, by_index: dict[str, str], where: str) -> None:
    """Replaces a short number in the image column of a VLMEvalKit table by the image of the row with that index."""
    index, image = row.get("index"), row.get("image")
    if not isinstance(index, str) or not isinstance(image, str):
        return
    if image.isdigit() and len(image) < 12:
        if image not in by_index:
            raise LVLMError(f"{where}: image refers to index {image}, which no earlier row has")
        row["image"] = by_index[image]
    else:
        by_index[index] = image


def _first(row: dict, names: Sequence[str]):
    return next((row[name] for name in names if name in row), None)


def _question(row: dict, number: int, folder: Path, where: str) -> Question:
    options = _options(row, where)
    text = _first(row, TEXTS)
    if not isinstance(text, str) or not text.strip():
        raise LVLMError(f"{where} has no question; expected one of the columns {', '.join(TEXTS)}")
    hint = row.get("hint")
    lines = ([f"Hint: {hint}"] if isinstance(hint, str) else []) + [text.strip()]
    lines += [f"{letter}. {option}" for letter, option in options.items()]
    text, images = tables.interleave("\n".join(lines), _images(row, where), where)
    identity = _first(row, IDS)
    return Question(
        number if identity is None else identity,
        tuple(folder / image if isinstance(image, Path) else image for image in images),
        text,
        _label(_first(row, ANSWERS), options, where),
        str(_first(row, GROUPS) or "all"),
        {"options": tuple(options)},
        tuple(map(listed_name, images)),
    )


def _options(row: dict, where: str) -> dict[str, str]:
    """The options (letter -> text), from columns A, B, ..., from a list, or from columns option0, option1, ..."""
    lettered = {letter: str(row[letter]) for letter in LETTERS if letter in row}
    listed = _first(row, OPTIONS)
    if isinstance(listed, dict):
        lettered = {str(letter).upper(): str(text) for letter, text in listed.items()}
    elif listed is not None:
        lettered = dict(zip(LETTERS, map(str, tables.as_list(listed, where)), strict=False))
    elif not lettered:
        numbered = sorted((name for name in row if re.fullmatch(r"option_?\d+", name)), key=_number)
        # Q-Bench2 fills unneeded columns.
        texts = (str(row[name]) for name in numbered if row[name] != "N/A")
        lettered = dict(zip(LETTERS, texts, strict=False))
    if not lettered and _yes_no(_first(row, ANSWERS)) is not None:
        lettered = {"A": "True", "B": "False"}  # the published NLVR2 is a statement about two images
    if len(lettered) < 2 or any(letter not in LETTERS for letter in lettered):
        raise LVLMError(f"{where} has no options; expected columns A, B, ..., or a list 'options' or 'choices'")
    return lettered


def _number(name: str) -> int:
    return int(re.search(r"\d+", name)[0])


def _yes_no(value) -> bool | None:
    return {"true": True, "yes": True, "false": False, "no": False}.get(str(value).strip().lower())


def _label(answer, options: dict[str, str], where: str) -> str:
    """The letter of the right option. `answer` is "B" or "(B)", as the option's text, or as its index from 0."""
    if answer is None:
        raise LVLMError(f"{where} has no answer; expected one of the columns {', '.join(ANSWERS)}")
    given_answer = str(answer).strip()
    letter = given_answer.strip("(). ").upper()
    if letter in options:
        return letter
    texts = {text.strip().lower(): letter for letter, text in options.items()}
    if given_answer.lower() in texts:
        return texts[given_answer.lower()]
    truth = _yes_no(answer)
    if truth is not None and {"true", "false"} <= texts.keys():
        return texts[str(truth).lower()]
    if given_answer.isdigit() and int(given_answer) < len(options):
        return list(options)[int(given_answer)]
    raise LVLMError(f"{where}: answer {given_answer!r} is not one of the options {', '.join(options)}")


def _images(row: dict, where: str) -> tuple[Path | bytes, ...]:
    value = _first(row, IMAGES)
    if value is not None:
        cells = tables.as_list(value, where)
    else:
        pair = [name for name in ("left_image", "right_image") if name in row]
        numbered = sorted((name for name in row if re.fullmatch(r"(image|img)_?\d+", name)), key=_number)
        cells = [row[name] for name in pair or numbered]
    return tuple(tables.picture(cell, f"{where}: image") for cell in cells if cell is not None)


def score(questions: Sequence[Question], answers: Mapping, protocol: Protocol) -> Scores:
    """Accuracy over all questions and of each category; an answer without an option letter is wrong and unparsed."""
    tally, unparsed = Tally(), 0
    groups = list(dict.fromkeys(question.group for question in questions))
    for question in questions:
        letter = parsers.letter(answers[question.key], question.extra["options"])
        unparsed += letter is None
        tally.correct[question.key] = letter == question.label
        counts = {"asked": 1, "right": letter == question.label, "unparsed": letter is None}
        tally.add(question.unit, **{f"{question.group}/{name}": count for name, count in counts.items()})
    counts = [f"{group}/{name}" for group in groups for name in ("asked", "right", "unparsed")]
    return tally.scores(counts, figures(groups, counts, protocol), {"parser": "letter", "unparsed": unparsed})


def figures(groups: Sequence[str], counts: Sequence[str], protocol: Protocol) -> dict[str, Figure]:
    """Accuracy and unparsed answers of all questions, and of each category if there are several."""
    totals = [f"{group}/asked" for group in groups]
    table = {
        "accuracy": ratio([f"{group}/right" for group in groups], totals),
        "unparsed": ratio([f"{group}/unparsed" for group in groups], totals),
    }
    for group in groups if len(groups) > 1 else ():
        table[f"{group}: accuracy"] = ratio([f"{group}/right"], [f"{group}/asked"])
        table[f"{group}: unparsed"] = ratio([f"{group}/unparsed"], [f"{group}/asked"])
    return table


BENCHMARK = Benchmark(
    name="choices",
    protocols=PROTOCOLS,
    links=(
        "https://huggingface.co/datasets/BLINK-Benchmark/BLINK",
        "https://huggingface.co/datasets/MUIRBENCH/MUIRBENCH",
        "https://github.com/open-compass/VLMEvalKit (tables in LMUData)",
    ),
    question_files=question_files,
    read=read,
    score=score,
    figures=figures,
    directions={"accuracy": 1, "unparsed": -1},
    headlines=("accuracy", "unparsed"),
    judged=(("accuracy",),),
    uses=("question_file", "image_folder", "groups"),
)
