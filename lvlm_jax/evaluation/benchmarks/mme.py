"""MME: two yes/no questions about each image, in fourteen subtasks (Fu et al. 2023, arXiv 2306.13394).

A subtask's score is 100 * (accuracy + accuracy+), where accuracy+ is the share of images with both questions right;
200 at most. Folders: `MME_Benchmark_release_version/SUBTASK/` with NAME.jpg and NAME.txt side by side, or in `images/`
and `questions_answers_YN/`; a text file has two lines "question, tab, Yes or No".
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import binary, folders, parsers
from lvlm_jax.evaluation.protocol import Protocol, register
from lvlm_jax.evaluation.question import Data, Question
from lvlm_jax.evaluation.scores import Figure, Scores, Tally, ratio, total

HALLUCINATION = ("existence", "count", "position", "color")
PERCEPTION = (*HALLUCINATION, "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUMS = {"hallucination": HALLUCINATION, "perception": PERCEPTION, "cognition": COGNITION}
RELEASE = "MME_Benchmark_release_version"
IMAGE_ENDINGS = (".jpg", ".png", ".jpeg")


def _protocol(name: str, about: str, groups: tuple[str, ...]) -> Protocol:
    return Protocol(f"mme/{name}", "mme", about, "first-four", 16, groups=groups)


register(
    _protocol("hallucination", "existence, count, position, color; at most 800 (default)", HALLUCINATION),
    _protocol("perception", "ten subtasks; at most 2000", PERCEPTION),
    _protocol("all", "fourteen subtasks; at most 2000 and 800", PERCEPTION + COGNITION),
)


def question_files(data: Data, protocol: Protocol) -> dict[str, list[Path]]:
    """Subtask -> its text files, in the order of their names."""
    folder = folders.data_folder(data)
    unknown = set(data.groups) - set(protocol.groups)
    if unknown:
        raise LVLMError(
            f"{protocol.name} has no subtask {sorted(unknown)[0]!r}; it has {', '.join(protocol.groups)}"
        )
    places = [folder, folder / RELEASE, folder / "MME" / RELEASE, folder / "MME", folder / "mme" / RELEASE]
    found = {}
    for task in protocol.groups:
        if data.groups and task not in data.groups:
            continue
        for place in places:
            nested = place / task / "questions_answers_YN"
            texts = sorted((nested if nested.is_dir() else place / task).glob("*.txt"))
            if texts:
                found[task] = texts
                break
        else:
            raise LVLMError(
                f"MME subtask {task!r} is missing: no folder {RELEASE}/{task} with NAME.txt "
                f"(or questions_answers_YN/NAME.txt) in {str(folder)!r}"
            )
    return found


def read(data: Data, protocol: Protocol, need_images: bool = False) -> list[Question]:
    """Two questions an image; ids are "IMAGE/1" and "IMAGE/2".

    Raises:
        LVLMError: a subtask, or the picture of a text file (with `need_images`), is missing; a text file is not two
          lines of a question and Yes or No.
    """
    questions = []
    for task, texts in question_files(data, protocol).items():
        for path in texts:
            image = _image(path, need_images)
            lines = [line for line in files.read_text(path, "MME file").splitlines() if line.strip()]
            if len(lines) != 2:
                raise LVLMError(f"MME file {str(path)!r} has {len(lines)} lines; expected two questions")
            for number, line in enumerate(lines, start=1):
                text, _, label = line.rpartition("\t")
                label = label.strip().lower()
                if not text.strip() or label not in ("yes", "no"):
                    raise LVLMError(
                        f"line {number} of MME file {str(path)!r} is {line!r}; expected a question, a tab, Yes or No"
                    )
                questions.append(
                    Question(
                        f"{image.name}/{number}", (image,), text.strip(), label, task, {"number": number}
                    )
                )
    return questions


def _image(text_file: Path, needed: bool) -> Path:
    folder = text_file.parent
    if folder.name == "questions_answers_YN":
        folder = folder.parent / "images"
    for ending in IMAGE_ENDINGS:
        image = folder / f"{text_file.stem}{ending}"
        if image.is_file():
            return image
    if needed:
        raise LVLMError(
            f"image of MME file {str(text_file)!r} is missing: no {text_file.stem}.jpg or .png in {str(folder)!r}"
        )
    return folder / f"{text_file.stem}.jpg"


def prompt(question: Question, protocol: Protocol) -> str:
    """The text put to a model."""
    return protocol.prompt(question)


def score(questions: Sequence[Question], answers: Mapping, protocol: Protocol) -> Scores:
    """Score, accuracy and accuracy+ of each subtask, and the sums (hallucination, perception, cognition) all of whose
    subtasks were asked. An answer that is neither yes nor no is wrong, and counted as unparsed."""
    parse = parsers.yes_no(protocol.parser)
    tally, pairs, unparsed = Tally(), {}, 0
    tasks = list(dict.fromkeys(question.group for question in questions))
    for question in questions:
        label = binary.label_of(question)
        said = parse(answers[question.key], label)
        unparsed += said is None
        right = said == label
        tally.correct[question.key] = right
        task = question.group
        tally.add(
            question.unit, **{f"{task}/asked": 1, f"{task}/right": right, f"{task}/unparsed": said is None}
        )
        pairs.setdefault((task, question.unit), []).append(right)
    for (task, unit), rights in pairs.items():
        tally.add(unit, **{f"{task}/images": 1, f"{task}/both": all(rights) and len(rights) == 2})
    points = {task: _points(task) for task in tasks}
    figures = {
        name: total([points[task] for task in members])
        for name, members in SUMS.items()
        if set(members) <= set(tasks)
    }
    for task in tasks:
        figures[f"{task}: score"] = points[task]
        figures[f"{task}: accuracy"] = ratio([f"{task}/right"], [f"{task}/asked"])
        figures[f"{task}: accuracy+"] = ratio([f"{task}/both"], [f"{task}/images"])
        figures[f"{task}: unparsed"] = ratio([f"{task}/unparsed"], [f"{task}/asked"])
    counts = [f"{task}/{kind}" for task in tasks for kind in ("asked", "right", "unparsed", "images", "both")]
    return tally.scores(counts, figures, {"parser": protocol.parser, "unparsed": unparsed})


def _points(task: str) -> Figure:
    single = ratio([f"{task}/right"], [f"{task}/asked"])
    both = ratio([f"{task}/both"], [f"{task}/images"])
    return Figure(lambda totals: 100 * (single.compute(totals) + both.compute(totals)), single.over, "points")
