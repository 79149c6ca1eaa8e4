"""HallusionBench: yes/no questions asked of a figure and of changed copies of it, or without any figure
(Guan et al. 2023, arXiv 2310.14566).

`HallusionBench.json` is a list of questions. Those of a set (category, subcategory, set_id) are about one fact; figure
0 is the original, or for category VS no figure at all. Accuracies of the paper:
  aAcc  questions answered right
  qAcc  question pairs, that is one question of a set over all its figures, answered right every time
  fAcc  figures all of whose questions are answered right; questions without a figure are left out

The official scorer asks GPT-4 whether an answer agrees with the reference, and takes "unclear" for right where there is
no figure. Here an answer is read for one word yes or no; without one it is unparsed, which is wrong, and counted.
Sets are resampled for intervals, not images, because a question pair spans the figures of a set.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import binary, folders, parsers
from lvlm_jax.evaluation.answers import AnswerFormat, Row
from lvlm_jax.evaluation.benchmark import Benchmark
from lvlm_jax.evaluation.protocol import LLAVA_SUFFIX, Protocol
from lvlm_jax.evaluation.question import Data, Question
from lvlm_jax.evaluation.scores import Figure, Scores, Tally, ratio

# Visual dependent: nobody can answer without the figure. Visual supplement: the figure adds to what is known.
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
        "pairs of yes/no questions; one yes/no word counts, all else is wrong (default)",
        "strict",
        16,
        suffix=LLAVA_SUFFIX,
        groups=CATEGORIES,
    ),
)


def question_files(data: Data, protocol: Protocol) -> dict[str, list[Path]]:
    """The file of all questions."""
    folders.chosen_groups(data, protocol.groups, "HallusionBench", "category")
    if data.question_file is not None:
        return {"questions": [files.existing_file(data.question_file, "question file")]}
    return {"questions": [folders.find(data, ["HallusionBench.json"], PLACES, "HallusionBench's question file")]}


def read(data: Data, protocol: Protocol, need_images: bool = False) -> list[Question]:
    """The questions of both categories, as the file has them; text-only ones have no image.

    Raises:
        LVLMError: the file or (with `need_images`) a picture is missing, a row is malformed, a question is there twice.
    """
    (path,) = question_files(data, protocol)["questions"]
    rows, seen = [], set()
    for line, row in files.read_rows(path, "question file"):
        where = f"entry {line} of question file {str(path)!r}"
        group, identity = _key(row, where)
        files.unique(seen, (group, identity), where)
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
    """Category, and the rest of what makes a question: "illusion/0_1/2" is question 2 of figure 1 of set 0."""
    category, subcategory, one_set, figure, number = (
        str(files.field(row, [name], (str, int), where)) for name in (*SET, "figure_id", "question_id")
    )
    return category, f"{subcategory}/{one_set}_{figure}/{number}"


def _image(row: dict, where: str) -> str | None:
    """The picture's name below the folder of all pictures ("VD/illusion/0_1.png"); None for a text-only question."""
    if str(files.field(row, ["visual_input"], (str, int), where)) == "0":
        return None
    parts = PurePosixPath(files.field(row, ["filename"], str, where)).parts
    return "/".join(parts[1:] if parts[:1] == (IMAGE_FOLDER,) else parts)


def score(questions: Sequence[Question], answers: Mapping, protocol: Protocol) -> Scores:
    """The three accuracies and the share of unparsed answers, over all questions and of each category."""
    parse = parsers.yes_no(protocol.parser)
    tally, unparsed = Tally(), 0
    together: dict[tuple, list[bool]] = {}  # questions that count as one, if all are right
    groups = list(dict.fromkeys(question.group for question in questions))
    for question in questions:
        row, group, label = question.extra, question.group, binary.label_of(question)
        said = parse(answers[question.key], label)
        unparsed += said is None
        right = said == label
        tally.correct[question.key] = right
        unit = "/".join(str(row[name]) for name in SET)
        counts = {"asked": 1, "right": right, "unparsed": said is None}
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
    """aAcc, qAcc, fAcc and unparsed of all questions, and of each category where there are several."""
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
    """The question file with `model_prediction` in each entry, as the official scorer takes it."""

    def row(self, entry: dict, place: int, group: str | None, where: str) -> Row:
        """One row; without a prediction it is read as a line of other benchmarks is."""
        if PREDICTION not in entry:
            return super().row(entry, place, group, where)
        category, identity = _key(entry, where)
        image = _image(entry, where) if "filename" in entry else None
        return Row(
            where,
            identity,
            files.field(entry, [PREDICTION], str, where),
            category,
            files.field(entry, ["question"], str, where),
            () if image is None else (image,),
        )

    def entry(self, question: Question, text: str, protocol: Protocol, model_id: str) -> dict:
        """The question's own entry with the answer in it."""
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
