"""Balanced questions over several images of the pocket world: no constant answer is right more often than by chance.

`lvlm pocket-world --out DIR --balanced N` draws them (`pocket.balanced`): JSON lines `{question_id, images, kind, text,
label, options}`. Each option is one word, and the right one is first. All kinds are equally frequent. For each kind
and number of images, all answers are equally frequent.

Two figures accompany the accuracy: the accuracy of a blind constant, which always gives the most frequent answer of
each kind, and the margin by which the right answer is preferred to the likeliest wrong option.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import folders, margins, parsers, tables
from lvlm_jax.evaluation.answers import AnswerFormat
from lvlm_jax.evaluation.benchmark import Benchmark
from lvlm_jax.evaluation.protocol import LLAVA_SUFFIX, Protocol
from lvlm_jax.evaluation.question import Data, Question
from lvlm_jax.evaluation.scores import Figure, Scores, Tally, combined, ratio

NAMES = ("balanced.jsonl",)
PLACES = ("questions", ".")
IMAGE_PLACES = ("images", ".", "../images")
KNOWN = ("which_image", "in_all_images", "how_many_images", "same_object", "in_one_image")
COMPARED = ("which_lacks", "odd_one_out", "same_place", "shared_object")
PROTOCOLS = (
    Protocol(
        "pocket/multi-image",
        "pocket",
        "balanced questions over two to four images, one word asked for",
        "short",
        16,
        suffix=LLAVA_SUFFIX,
        groups=KNOWN,
    ),  # fmt: skip
    Protocol(
        "pocket/question-first",
        "pocket",
        "the same and comparisons of images, with the question before the images",
        "short",
        16,
        template="{question}{images}",
        suffix=LLAVA_SUFFIX,
        groups=(*KNOWN, *COMPARED),
    ),  # fmt: skip
)
WORDS = ("accuracy", "blind constant", "over blind")


def question_files(data: Data, protocol: Protocol) -> dict[str, list[Path]]:
    """The question file that the user names, or `questions/balanced.jsonl`."""
    if data.question_file is not None:
        return {"questions": [files.existing_file(data.question_file, "question file")]}
    what = "the pocket world's balanced questions (lvlm pocket-world --out DIR --balanced 2700 draws them)"
    return {"questions": [folders.find(data, NAMES, PLACES, what)]}


def read(data: Data, protocol: Protocol, need_images: bool = False) -> list[Question]:
    """The questions of the protocol's kinds.

    Raises:
        LVLMError: the file or (with `need_images`) an image is missing, a row is malformed, an id occurs twice.
    """
    ((path,),) = question_files(data, protocol).values()
    groups = folders.chosen_groups(data, protocol.groups, protocol.name, "kind")
    rows, ids = [], set()
    for number, row in tables.rows(path):
        where = f"row {number} of question file {str(path)!r}"
        identity = files.field(row, ["question_id"], (int, str), where)
        kind, text, label = (files.field(row, [name], str, where) for name in ("kind", "text", "label"))
        images, options = (files.field(row, [name], list, where) for name in ("images", "options"))
        files.unique(ids, str(identity), where)
        if not all(isinstance(name, str) for name in (*images, *options)):
            raise LVLMError(f"{where}: images and options are lists of strings")
        if len(set(options)) < 2 or options[0] != label:
            raise LVLMError(
                f"{where}: options are {options!r:.60}; expected the label {label!r:.30}, then other answers"
            )
        if kind in groups:
            rows.append((identity, images, text, label, kind, options))
    if not rows:
        raise LVLMError(f"{str(path)!r} has no question of the kinds {', '.join(groups)}; draw the questions again")
    names = [name for row in rows for name in row[1]]
    paths = folders.locate_images(data, names, IMAGE_PLACES, need_images, protocol.name)
    return [
        Question(identity, tuple(paths[name] for name in images), text, label, kind, {"options": tuple(options)})
        for identity, images, text, label, kind, options in rows
    ]


def score(questions: Sequence[Question], answers: Mapping, protocol: Protocol) -> Scores:
    """Counts the model's right answers, and those of a constant answer per kind. The parser "strict" reads yes/no."""
    constants = blind(questions)
    tally, unparsed = Tally(), 0
    for question in questions:
        text, label = answers[question.key], question.label.lower()
        if label in ("yes", "no"):
            reading = parsers.strict(text, label)
            unparsed += reading is None
            right = reading == label
        else:
            right = parsers.bare(text) == parsers.bare(question.label)
        tally.correct[question.key] = right
        counted = {"asked": 1, "right": right, "constant": question.label == constants[question.group]}
        tally.add(question.unit, **counted, **{f"{question.group}/{name}": count for name, count in counted.items()})
    groups = list(constants)
    counts = [f"{prefix}{name}" for prefix in ("", *(f"{group}/" for group in groups)) for name in _COUNTED]
    notes = {"parser": protocol.parser, "unparsed": unparsed, "constants": constants}
    return tally.scores(counts, figures(groups, counts, protocol), notes)


_COUNTED = ("asked", "right", "constant")


def blind(questions: Sequence[Question]) -> dict[str, str]:
    """The most frequent right answer of each kind of question; the first one if there is a tie."""
    labels: dict[str, Counter[str]] = {}
    for question in questions:
        labels.setdefault(question.group, Counter())[question.label] += 1
    return {group: counted.most_common(1)[0][0] for group, counted in labels.items()}


def figures(groups: Sequence[str], counts: Sequence[str], protocol: Protocol) -> dict[str, Figure]:
    """The accuracies of the model and of the blind constant and their difference, over all questions and by kind; also
    margins, if they were measured."""
    by_name = {}
    for heading, prefix in (("", ""), *((f"{group}: ", f"{group}/") for group in groups)):
        total, right, constant = (f"{prefix}{name}" for name in _COUNTED)
        both = [ratio([right], [total]), ratio([constant], [total])]
        over = combined(both, lambda values: values[0] - values[1], "share")
        over = Figure(over.compute, (total,), "share")
        of_heading = dict(zip(WORDS, (*both, over), strict=True))
        if "scored" in counts:
            of_heading |= margins.figures(prefix)
        by_name |= {f"{heading}{word}": figure for word, figure in of_heading.items()}
    return by_name


BENCHMARK = Benchmark(
    name="pocket",
    protocols=PROTOCOLS,
    links=("https://github.com/googlefonts/noto-emoji (the drawings; lvlm pocket-world draws the rest)",),
    question_files=question_files,
    read=read,
    score=score,
    figures=figures,
    directions={"accuracy": 1, "over blind": 1, "margin": 1, "right is likeliest": 1},
    headlines=("accuracy", "blind constant", "margin"),
    judged=(("accuracy",), ("margin",)),
    uses=("question_file", "image_folder", "groups"),
    answers=AnswerFormat(),
    image_places=IMAGE_PLACES,
    margins=True,
)
