"""HallusionBench (Guan et al. 2023, arXiv 2310.14566): yes/no questions about a figure, about changed copies of it, or
without a figure.

`HallusionBench.json` is a list of questions. The questions of a set (category, subcategory, set_id) are about one fact;
figure 0 is the original, or for category VS no figure at all. Accuracies of the paper:
  aAcc  questions answered correctly
  qAcc  question pairs answered correctly: one question of a set, over all its figures
  fAcc  figures with all questions answered correctly; questions without a figure are left out

The official scorer asks GPT-4 whether an answer agrees with the reference, and counts "unclear" as correct for
questions without a figure. Here an answer is parsed for one word, yes or no; an answer without it is wrong, and is
counted as unparsed. The bootstrap resamples sets instead of images, because a question pair spans the figures of a set.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import binary, folders, parsers
from lvlm_jax.evaluation.answers import AnswerFormat, AnswerRow
from lvlm_jax.evaluation.benchmark import Benchmark
from lvlm_jax.evaluation.protocol import LLAVA_SUFFIX, Protocol
from lvlm_jax.evaluation.question import Data, Question
from lvlm_jax.evaluation.scores import Figure, Scores, Tally, ratio

# Visual dependent: the figure is necessary. Visual supplement: the figure adds to general knowledge.
CATEGORIES = ("VD", "VS")
PLACES = (".", "HallusionBench", "hallusion_bench", "data")
IMAGE_FOLDER = "hallusion_bench"
IMAGE_PLACES = (IMAGE_FOLDER, f"HallusionBench/{IMAGE_FOLDER}", f"{IMAGE_FOLDER}/{IMAGE_FOLDER}", "images", ".")
SET = ("category", "subcategory", "set_id")
PREDICTION = "model_prediction"
COUNTS = ("asked", "right", "unparsed", "pairs", "right pairs", "figures", "right figures")

PROTOCOLS = (
    Protocol(
        "hallusionbench/strict",
        "hallusionbench",
        "pairs of yes/no questions; one yes/no word counts, anything else is wrong (default)",
        "strict",
        16,
        suffix=LLAVA_SUFFIX,
        groups=CATEGORIES,
    ),
)


def question_files(data: Data, protocol: Protocol) -> dict[str, list[Path]]:
    """The file of all questions, under the role "questions"."""
    folders.chosen_groups(data, protocol.groups, "HallusionBench", "category")
    if data.question_file is not None:
        return {"questions": [files.existing_file(data.question_file, "question file")]}
    return {"questions": [folders.find(data, ["HallusionBench.json"], PLACES, "HallusionBench's question file")]}


def read(data: Data, protocol: Protocol, need_images: bool = False) -> list[Question]:
    """The questions of both categories, in the file's order; text-only questions have no image.

    Raises:
        LVLMError: the file or (with `need_images`) an image is missing, a row is malformed, or a question occurs twice.
    """
    (path,) = question_files(data, protocol)["questions"]
    rows, keys = [], set()
    for line, row in files.read_rows(path, "question file"):
        where = f"entry {line} of question file {str(path)!r}"
        group, identity = _key(row, where)
        files.unique(keys, (group, identity), where)
        text = files.field(row, ["question"], str, where)
        label = {"0": "no", "1": "yes"}.get(str(files.field(row, ["gt_answer"], (str, int), where)))
        if group not in CATEGORIES or label is None:
            raise LVLMError(
                f"{where} has category {group!r} and gt_answer {row['gt_answer']!r}; expected "
                f"{' or '.join(CATEGORIES)}, and 0 or 1"
            )
        if group in (data.groups or protocol.groups):
            rows.append((identity, _image(row, where), text, label, group, row))
    names = [image for _, image, *_ in rows if image is not None]
    paths = folders.locate_images(data, names, IMAGE_PLACES, need_images, "HallusionBench") if names else {}
    return [
        Question(identity, (paths[image],), text, label, group, row, (image,))
        if image is not None
        else Question(identity, (), text, label, group, row)
        for identity, image, text, label, group, row in rows
    ]


def _key(row: dict, where: str) -> tuple[str, str]:
    """The category of a question, and its id within it: "illusion/0_1/2" is question 2 of figure 1 of set 0."""
    category, subcategory, one_set, figure, number = (
        str(files.field(row, [name], (str, int), where)) for name in (*SET, "figure_id", "question_id")
    )
    return category, f"{subcategory}/{one_set}_{figure}/{number}"


def _image(row: dict, where: str) -> str | None:
    """The image's name below the folder of all images ("VD/illusion/0_1.png"); None for a text-only question."""
    if str(files.field(row, ["visual_input"], (str, int), where)) == "0":
        return None
    parts = PurePosixPath(files.field(row, ["filename"], str, where)).parts
    return "/".join(parts[1:] if parts[:1] == (IMAGE_FOLDER,) else parts)


def score(questions: Sequence[Question], answers: Mapping, protocol: Protocol) -> Scores:
    """The three accuracies and the share of unparsed answers, over all questions and per category."""
    parse = parsers.yes_no(protocol.parser)
    tally, unparsed = Tally(), 0
    together: dict[tuple, list[bool]] = {}  # questions that count as one, correct if all are
    groups = list(dict.fromkeys(question.group for question in questions))
    for question in questions:
        row, group, label = question.extra, question.group, binary.label_of(question)
        reply = parse(answers[question.key], label)
        unparsed += reply is None
        right = reply == label
        tally.correct[question.key] = right
        unit = "/".join(str(row[name]) for name in SET)
        counts = {"asked": 1, "right": right, "unparsed": reply is None}
        tally.add(unit, **{f"{group}/{name}": count for name, count in counts.items()})
        together.setdefault((unit, group, "pairs", str(row["question_id"])), []).append(right)
        if (group, str(row["figure_id"])) != ("VS", "0"):
            together.setdefault((unit, group, "figures", str(row["figure_id"])), []).append(right)
    for (unit, group, kind, _), rights in together.items():
        tally.add(unit, **{f"{group}/{kind}": 1, f"{group}/right {kind}": all(rights)})
    names = [f"{group}/{name}" for group in groups for name in COUNTS]
    notes = {"parser": protocol.parser, "unparsed": unparsed, "resampled": "sets of figures"}
    return tally.scores(names, figures(groups, names, protocol), notes)


def figures(groups: Sequence[str], counts: Sequence[str], protocol: Protocol) -> dict[str, Figure]:
    """aAcc, qAcc, fAcc and unparsed of all questions, and per category if there are several."""
    kinds = {
        "aAcc": ("right", "asked"),
        "qAcc": ("right pairs", "pairs"),
        "fAcc": ("right figures", "figures"),
        "unparsed": ("unparsed", "asked"),
    }
    parts = {"": groups} | {f"{group}: ": [group] for group in groups if len(groups) > 1}
    return {
        f"{prefix}{name}": ratio([f"{group}/{part}" for group in members], [f"{group}/{whole}" for group in members])
        for prefix, members in parts.items()
        for name, (part, whole) in kinds.items()
    }


class Predictions(AnswerFormat):
    """The question file with `model_prediction` in each entry, as for the official scorer."""

    def row(self, entry: dict, place: int, group: str | None, where: str) -> AnswerRow:
        """Makes a row; an entry without a prediction is read like a line of other benchmarks."""
        if PREDICTION not in entry:
            return super().row(entry, place, group, where)
        category, identity = _key(entry, where)
        image = _image(entry, where) if "filename" in entry else None
        return AnswerRow(
            where,
            identity,
            files.field(entry, [PREDICTION], str, where),
            category,
            files.field(entry, ["question"], str, where),
            () if image is None else (image,),
        )

    def entry(self, question: Question, text: str, protocol: Protocol, model_id: str) -> dict:
        """The question's own entry with the answer added."""
        return {**question.extra, PREDICTION: text}


BENCHMARK = Benchmark(
    name="hallusionbench",
    protocols=PROTOCOLS,
    links=("https://github.com/tianyi-lab/HallusionBench",),
    question_files=question_files,
    read=read,
    score=score,
    figures=figures,
    directions={"aAcc": 1, "qAcc": 1, "fAcc": 1, "unparsed": -1},
    headlines=("aAcc", "qAcc", "fAcc", "unparsed"),
    judged=(("aAcc",),),
    uses=("question_file", "image_folder", "groups"),
    answers=Predictions("HallusionBench_result.json"),
    image_places=IMAGE_PLACES,
)
