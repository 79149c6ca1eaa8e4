"""MME: two yes/no questions about each image, in fourteen subtasks (Fu et al. 2023, arXiv 2306.13394).

A subtask's score is 100 * (accuracy + accuracy+), where accuracy+ is the share of images with both answers correct; at
most 200. Folders: `MME_Benchmark_release_version/SUBTASK/` with NAME.jpg and NAME.txt side by side, or in `images/` and
`questions_answers_YN/`; a text file has two lines "question, tab, Yes or No".
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import binary, folders, parsers
from lvlm_jax.evaluation.answers import AnswerFormat, AnswerRow
from lvlm_jax.evaluation.benchmark import Benchmark
from lvlm_jax.evaluation.protocol import Protocol
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


PROTOCOLS = (
    _protocol("hallucination", "existence, count, position, color; at most 800 (default)", HALLUCINATION),
    _protocol("perception", "ten subtasks; at most 2000", PERCEPTION),
    _protocol("all", "fourteen subtasks; at most 2000 and 800", PERCEPTION + COGNITION),
)


def question_files(data: Data, protocol: Protocol) -> dict[str, list[Path]]:
    """Subtask -> its text files, sorted by name."""
    folder = folders.data_folder(data)
    places = [folder, folder / RELEASE, folder / "MME" / RELEASE, folder / "MME", folder / "mme" / RELEASE]
    paths = {}
    for task in folders.chosen_groups(data, protocol.groups, protocol.name, "subtask"):
        for place in places:
            nested = place / task / "questions_answers_YN"
            texts = sorted((nested if nested.is_dir() else place / task).glob("*.txt"))
            if texts:
                paths[task] = texts
                break
        else:
            raise LVLMError(
                f"MME subtask {task!r} is missing: no folder {RELEASE}/{task} with NAME.txt "
                f"(or questions_answers_YN/NAME.txt) in {str(folder)!r}"
            )
    return paths


def read(data: Data, protocol: Protocol, need_images: bool = False) -> list[Question]:
    """Two questions per image; ids are "IMAGE/1" and "IMAGE/2".

    Raises:
        LVLMError: a subtask, or (with `need_images`) the image of a text file, is missing; or a text file is not two
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
                    Question(f"{image.name}/{number}", (image,), text.strip(), label, task, {"number": number})
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


def score(questions: Sequence[Question], answers: Mapping, protocol: Protocol) -> Scores:
    """Score, accuracy and accuracy+ of each subtask, and those sums (hallucination, perception, cognition) whose
    subtasks were all asked.

    An answer that is neither yes nor no is wrong, and is counted as unparsed.
    """
    parse = parsers.yes_no(protocol.parser)
    tally, pairs, unparsed = Tally(), {}, 0
    tasks = list(dict.fromkeys(question.group for question in questions))
    for question in questions:
        label = binary.label_of(question)
        reply = parse(answers[question.key], label)
        unparsed += reply is None
        right = reply == label
        tally.correct[question.key] = right
        task = question.group
        tally.add(question.unit, **{f"{task}/asked": 1, f"{task}/right": right, f"{task}/unparsed": reply is None})
        pairs.setdefault((task, question.unit), []).append(right)
    for (task, unit), rights in pairs.items():
        tally.add(unit, **{f"{task}/images": 1, f"{task}/both": all(rights) and len(rights) == 2})
    counts = [f"{task}/{kind}" for task in tasks for kind in ("asked", "right", "unparsed", "images", "both")]
    notes = {"parser": protocol.parser, "unparsed": unparsed}
    return tally.scores(counts, figures(tasks, counts, protocol), notes)


def figures(groups: Sequence[str], counts: Sequence[str], protocol: Protocol) -> dict[str, Figure]:
    """The sums whose subtasks are all among `groups`, and the figures of each subtask."""
    points = {task: _points(task) for task in groups}
    table = {
        name: total([points[task] for task in members]) for name, members in SUMS.items() if set(members) <= set(groups)
    }
    for task in groups:
        table[f"{task}: score"] = points[task]
        table[f"{task}: accuracy"] = ratio([f"{task}/right"], [f"{task}/asked"])
        table[f"{task}: accuracy+"] = ratio([f"{task}/both"], [f"{task}/images"])
        table[f"{task}: unparsed"] = ratio([f"{task}/unparsed"], [f"{task}/asked"])
    return table


def _points(task: str) -> Figure:
    single = ratio([f"{task}/right"], [f"{task}/asked"])
    accuracy_plus = ratio([f"{task}/both"], [f"{task}/images"])
    return Figure(lambda totals: 100 * (single.compute(totals) + accuracy_plus.compute(totals)), single.over, "points")


class TextFiles(AnswerFormat):
    """A folder with one text file per subtask, of lines "image, tab, question, tab, truth, tab, answer"."""

    def read(self, path: Path, group: str | None = None) -> list[AnswerRow]:
        """The rows of a text file, without ids; other files are read as JSON lines."""
        if path.suffix != ".txt":
            return super().read(path, group)
        rows = []
        for number, line in enumerate(files.read_text(path, "answer file").split("\n"), start=1):
            if not line.strip():
                continue
            where = f"line {number} of answer file {str(path)!r}"
            cells = line.rstrip("\r").split("\t")
            if len(cells) != 4:
                raise LVLMError(f"{where} has {len(cells)} cells; expected image, question, truth, answer between tabs")
            image, question, _, text = cells
            rows.append(AnswerRow(where, None, text, group or path.stem, question.strip(), (image.strip(),)))
        return rows

    def write(
        self, path: Path, questions: Sequence[Question], answers: Mapping, protocol: Protocol, model_id: str = ""
    ) -> list[Path]:
        """Writes one file per subtask into the folder `path`."""
        by_task: dict[str, list[str]] = {}
        for question in questions:
            if question.key in answers:
                answer = " ".join(answers[question.key].split())  # a tab or line end would break the table
                line = "\t".join((question.unit, question.text, question.label.capitalize(), answer))
                by_task.setdefault(question.group, []).append(line + "\n")
        paths = []
        for task, lines in by_task.items():
            paths.append(path / f"{task}.txt")
            files.write_whole(paths[-1], "".join(lines))
        return paths


BENCHMARK = Benchmark(
    name="mme",
    protocols=PROTOCOLS,
    links=("https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation",),
    question_files=question_files,
    read=read,
    score=score,
    figures=figures,
    directions=dict.fromkeys((*SUMS, "score", "accuracy", "accuracy+"), 1) | {"unparsed": -1},
    headlines=("hallucination", "perception", "cognition"),
    judged=((*SUMS, "score", "accuracy"),),
    uses=("groups",),
    answers=TextFiles("answers"),
    image_places=tuple(f"{top}{{group}}{end}" for top in ("", f"{RELEASE}/") for end in ("", "/images")),
)
