"""Examples for a report: questions on which a method fixed or broke an answer, drawn with a seed.

Answers come from the answer files beside the scores, if their hashes are those of the scored files. The scores say
which of two answers is right, and the label follows from that.
"""

import base64
import dataclasses
import io
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import BENCHMARKS, answers, parsers
from lvlm_jax.evaluation.protocol import files_hash
from lvlm_jax.evaluation.report.runs import Comparison, Run
from lvlm_jax.processors.images import open_image

LONGEST_TEXT = 600  # characters of an answer
PICTURE_BYTES = 1_900_000  # of all pictures, before base64, which adds a third
SIDES, QUALITIES = (240, 180, 128, 96, 64), (80, 60, 40)
# Image folders of all benchmarks below a data folder: people store the images of several benchmarks in one place.
PLACES = dict.fromkeys((".", *(place for benchmark in BENCHMARKS.values() for place in benchmark.image_places)))


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer in a file: its text, and the prompt and the names of the images if the file has them."""

    text: str
    prompt: str | None
    images: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Example:
    """A question that a model got right only with some methods, or only without them.

    Attributes:
        baseline: the model without a method.
        group: split or subtask of the question.
        question: the prompt, or its number if the answer file does not contain it (AMBER).
        without: the answer without a method.
        answers: runs with a method, each with its answer.
        fixed: whether the answers with a method are right; if not, the answer without a method is right.
        right: the right answer if it is a word; empty for captions.
        pictures: files of the images that were found.
    """

    baseline: Run
    group: str
    question: str
    without: str
    answers: tuple[tuple[Run, str], ...]
    fixed: bool
    right: str
    pictures: tuple[Path, ...]


def choose(
    comparisons: Mapping[Run, Comparison | str], folders: Sequence[Path], each: int = 2, seed: int = 0
) -> list[Example]:
    """At most `each` fixed and `each` broken questions of every run that is compared with the model alone.

    A question that is drawn for several methods is one example.

    Args:
        folders: folders that are searched for images, before the data folder of the record.
        seed: the same runs and seed give the same examples.
    """
    known: dict[Run, dict[tuple[str, str], Answer]] = {}

    def answers_of(run: Run) -> dict[tuple[str, str], Answer]:
        if run not in known:
            try:
                known[run] = read(run)
            except LVLMError as error:
                warnings.warn(f"no examples of {run.name}: {error}", stacklevel=2)
                known[run] = {}
        return known[run]

    examples: dict[tuple[Run, tuple[str, str]], Example] = {}
    for run, compared in comparisons.items():
        if isinstance(compared, str) or compared.baseline is None or each < 1:
            continue
        other = compared.baseline
        ours, theirs = answers_of(run), answers_of(other)
        places = [files.expand(folder) for folder in folders]
        if run.answered_by.get("data"):
            places.append(Path(str(run.answered_by["data"])))
        for fixed in (True, False):
            keys = [
                key
                for key, right in run.correct.items()
                if right == fixed != other.correct[key] and key in ours and key in theirs
                if ours[key].prompt == theirs[key].prompt
            ]
            drawn = random.Random(f"{seed} {run.protocol.name} {fixed}").sample(keys, min(each, len(keys)))
            for key in drawn:
                one = _example(run, other, key, ours[key], theirs[key], fixed, places)
                already = examples.setdefault((other, key), one)
                if already is not one:
                    examples[other, key] = dataclasses.replace(already, answers=already.answers + one.answers)
    return list(examples.values())


def _example(
    run: Run, baseline: Run, key: tuple[str, str], ours: Answer, theirs: Answer, fixed: bool, places: Sequence[Path]
) -> Example:
    mended, spoilt = (ours.text, theirs.text) if fixed else (theirs.text, ours.text)
    group = key[0]
    pictures = (picture(name, group, places) for name in ours.images)
    return Example(
        baseline,
        group,
        (ours.prompt or f"{group}, question {key[1]}").strip(),
        _shortened(theirs.text),
        ((run, _shortened(ours.text)),),
        fixed,
        right_answer(run.protocol.parser, mended, spoilt),
        tuple(filter(None, pictures)),
    )


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT].rstrip() + " …"


def read(run: Run) -> dict[tuple[str, str], Answer]:
    """The answers of a run by question, from the files beside its scores.

    Raises:
        LVLMError: a file is not there, is malformed, or is not the one that was scored.
    """
    by_id: dict[str, list[tuple[str, str]]] = {}
    for key in run.correct:
        by_id.setdefault(key[1], []).append(key)
    image_of = {_number(unit): unit for unit in run.units}
    answers = {}
    for entry in run.record["answers"]:
        path = run.path.parent / Path(entry["name"]).name
        if not files.exists(path):
            raise LVLMError(f"its answers {entry['name']!r} are not in {str(run.path.parent)!r}")
        content = sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]
        if files_hash(content) != entry["sha256"]:
            raise LVLMError(f"{str(path)!r} has changed since it was scored")
        for identity, group, answer in _rows(path, run):
            keys = [key for key in by_id.get(identity, []) if group in (None, key[0])]
            if len(keys) != 1:
                continue
            # A description is identified by the number of its image.
            if keys[0][0] in run.benchmark.descriptions and _number(identity) in image_of:
                answer = dataclasses.replace(answer, images=(image_of[_number(identity)],))
            answers[keys[0]] = answer
    return answers


def _number(name: str) -> int | None:
    """The number of an image, which is the last in its name; None if it has none."""
    digits = re.findall(r"\d+", Path(name).stem)
    return int(digits[-1]) if digits else None


def _rows(path: Path, run: Run) -> Iterator[tuple[str, str | None, Answer]]:
    """(id, group or None, answer) of the rows of an answer file or folder."""
    protocol = run.protocol
    groups = {group for group, _ in run.correct}
    # A prompt without the question's text is the same for all.
    same = None if "{question}" in protocol.template else protocol.template + protocol.suffix
    nth: Counter = Counter()
    for row in answers.read([(None, path)], run.benchmark.answers, protocol.groups):
        nth[row.group, row.images] += 1
        # MME's rows have no ids: a question is identified by its image, and by whether it is the first or the second.
        identity = f"{row.images[0]}/{nth[row.group, row.images]}" if row.id is None else row.id
        yield (identity, row.group if row.group in groups else None, Answer(row.text, row.prompt or same, row.images))


def right_answer(parser: str, right: str, wrong: str) -> str:
    """The label under which a parser reads `right` as correct and `wrong` as incorrect; "" if there is none."""
    if parser == "letter":
        return parsers.letter(right, parsers.LETTERS) or ""
    if parser == "short":
        return parsers.bare(right)
    if parser not in parsers.YES_NO:
        return ""
    parse = parsers.yes_no(parser)
    fitting = [label for label in ("yes", "no") if parse(right, label) == label != parse(wrong, label)]
    return fitting[0] if len(fitting) == 1 else ""


def picture(name: str, group: str, places: Sequence[Path]) -> Path | None:
    """The file of an image in one of the folders, or in a usual subfolder of benchmarks; None if it is in none."""
    within = [place.replace("{group}", group) for place in PLACES]
    written = Path(name)
    inside = not written.is_absolute() and ".." not in written.parts  # a name cannot lead out of the folders
    names = dict.fromkeys([written] * inside + [Path(written.name)])
    paths = (place / folder / one for place in places for folder in within for one in names)
    return next((path for path in paths if path.is_file()), None)


def thumbnails(paths: Sequence[Path]) -> dict[Path, str]:
    """Pictures as small data URIs that together stay within `PICTURE_BYTES`; one that cannot be opened is left out."""
    distinct = list(dict.fromkeys(paths))
    uris = {}
    for path in distinct:
        try:
            image = open_image(path)
        except LVLMError as error:
            warnings.warn(str(error), stacklevel=2)
            continue
        kind, content = _encoded(image, PICTURE_BYTES / len(distinct))
        uris[path] = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return uris


def _encoded(image: Image.Image, budget: float) -> tuple[str, bytes]:
    """The format and the bytes of a picture: PNG for a small drawing, else the largest JPEG in the budget."""
    attempts = [("png", max(image.size), {"optimize": True})] * (max(image.size) <= 128)
    attempts += [("jpeg", side, {"quality": quality}) for side in SIDES for quality in QUALITIES]
    for kind, side, options in attempts:
        small, file = image.copy(), io.BytesIO()
        small.thumbnail((side, side))
        small.save(file, kind, **options)
        if file.tell() <= budget:
            break
    return kind, file.getvalue()
