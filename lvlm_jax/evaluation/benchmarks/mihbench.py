"""Yes/no and one-word questions over several images: MIHBench (existence, count, identity) and the pocket
world's questions.

MIHBench (Li et al. 2025, arXiv 2508.00726): JSON lines over val2014 and CO3D; existence 3 x 800 (random, popular,
adversarial), count 800, identity 800. A file has its published name (`RELEASED`) or the name of its
kind. The same reader takes the parquet edition, and any rows of `images` (or `image_list`, `image`), `question` (or
`text`) and `label`; kinds come from a column `task` or `kind`, else from the file's name.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import binary, folders, parsers, tables
from lvlm_jax.evaluation.answers import AnswerFormat
from lvlm_jax.evaluation.benchmark import Benchmark
from lvlm_jax.evaluation.protocol import LLAVA_SUFFIX, Protocol
from lvlm_jax.evaluation.question import Data, Question, listed_name
from lvlm_jax.evaluation.scores import Figure, Scores, Tally, ratio

GROUPS = ("existence_random", "existence_popular", "existence_adversarial", "count", "identity")
# Kind -> its file in the folder `Questions` of github.com/pgtrece/DAB, with its spelling.
RELEASED = {
    "existence_random": "Existence/new_ran/coco_pope_random_3.jsonl",
    "existence_popular": "Existence/new_pop/coco_pope_popular_3.jsonl",
    "existence_adversarial": "Existence/new_adv/coco_pope_adversarial_3.jsonl",
    "count": "Count/comparison_same_2.jsonl",
    "identity": "Id_Consitency/clip_questions_most_different_4.jsonl",
}
KIND_OF = {Path(name).stem: group for group, name in RELEASED.items()}
PLACES = (".", "MIHBench", "mihbench", "data", "MIHBench/data", "questions", "Questions", "MIHBench/Questions",
          "DAB/Questions")  # fmt: skip
IMAGE_PLACES = (*folders.COCO_IMAGES, "CO3D", "co3d", "../images", "..")


def _protocol(name: str, about: str, parser: str, length: int, groups: tuple[str, ...] = ()) -> Protocol:
    return Protocol(f"mihbench/{name}", "mihbench", about, parser, length, suffix=LLAVA_SUFFIX, groups=groups)


PROTOCOLS = (
    _protocol("strict", "existence, count, identity; one yes/no word counts (default)", "strict", 16, GROUPS),
    _protocol("official", "the same, with POPE's official parser", "official", 128, GROUPS),
    _protocol("short", "any yes/no or one-word questions over images, by --question-file", "short", 16),
    # Without the suffix the pocket model answers in sentences, and a sentence is not the expected word.
    _protocol("pocket", "pocket world: several images, one-word answers, by --question-file", "short", 16),
)


def question_files(data: Data, protocol: Protocol) -> dict[str, list[Path]]:
    """The question file that the user names; or one file per kind, such as `existence_random.jsonl`."""
    if data.question_file is not None:
        return {"questions": [files.existing_file(data.question_file, "question file")]}
    if not protocol.groups:
        raise LVLMError(f"{protocol.name} needs the question file by name; give --question-file")
    groups = folders.chosen_groups(data, protocol.groups, "MIHBench", "kind")
    return {
        group: [
            folders.find(
                data,
                [*(group + end for end in (".jsonl", ".json", ".parquet")), RELEASED[group]],
                PLACES,
                f"MIHBench {group}",
            )
        ]
        for group in groups
    }


def read(data: Data, protocol: Protocol, need_images: bool = False) -> list[Question]:
    """The questions, each with its images in order.

    Raises:
        LVLMError: a file or (with `need_images`) an image is missing, a row is malformed, or an id occurs twice.
    """
    rows, keys, kinds = [], set(), {}
    for role, (path,) in question_files(data, protocol).items():
        for number, row in tables.rows(path):
            where = f"row {number} of question file {str(path)!r}"
            cells = tables.as_list(
                files.field(row, ["images", "image_list", "image"], (list, str, dict, bytes), where), where
            )
            text = files.field(row, ["question", "text", "query"], str, where)
            label = str(files.field(row, ["label", "answer", "gt"], (str, int), where)).strip()
            own = row.get("kind") or row.get("task") or KIND_OF.get(path.stem, path.stem)
            group = role if role != "questions" else str(own)
            identity = next((row[name] for name in ("question_id", "id", "index") if name in row), number)
            files.unique(keys, (group, str(identity)), where)
            if not label:
                raise LVLMError(f"{where} has an empty label")
            kinds.setdefault(group)
            if not data.groups or group in data.groups:
                images = tuple(tables.picture(cell, f"{where}: image") for cell in cells)
                rows.append((identity, *tables.interleave(text, images, where), label, group))
    folders.chosen_groups(data, list(kinds), f"the question file of {protocol.name}", "kind")
    paths = {}
    # Group by group, because the images of identity are not in COCO's folder.
    for group in dict.fromkeys(row[4] for row in rows):
        names = [str(image) for row in rows if row[4] == group for image in row[2] if isinstance(image, Path)]
        if names:
            located = folders.locate_images(data, names, IMAGE_PLACES, need_images, protocol.name)
            paths |= {(group, name): path for name, path in located.items()}
    return [
        Question(
            identity,
            tuple(image if isinstance(image, bytes) else paths[group, str(image)] for image in images),
            text,
            label,
            group,
            names=tuple(map(listed_name, images)),
        )
        for identity, text, images, label, group in rows
    ]


def score(questions: Sequence[Question], answers: Mapping, protocol: Protocol) -> Scores:
    """POPE's figures for yes/no kinds; for others, how often the answer equals the label, ignoring case and article.

    Under the parser "short", yes/no questions are parsed by "strict".
    """
    groups = list(dict.fromkeys(question.group for question in questions))
    labels = {group: {question.label.lower() for question in questions if question.group == group} for group in groups}
    one_word = [group for group in groups if not labels[group] <= {"yes", "no"}]
    parse = parsers.yes_no("strict" if protocol.parser == "short" else protocol.parser)
    tally, unparsed = Tally(), 0
    for question in questions:
        text = answers[question.key]
        if question.group in one_word:
            tally.correct[question.key] = parsers.bare(text) == parsers.bare(question.label)
            tally.add(question.unit, **{f"{question.group}/right": tally.correct[question.key]})
        else:
            reply = parse(text, binary.label_of(question))
            unparsed += reply is None
            binary.count(tally, question, reply)
        tally.add(question.unit, asked=1, right=tally.correct[question.key], **{f"{question.group}/asked": 1})
    counts = [
        "asked",
        "right",
        *binary.names([group for group in groups if group not in one_word]),
        *(f"{group}/right" for group in one_word),
        *(f"{group}/asked" for group in groups),
    ]
    notes = {"parser": protocol.parser, "unparsed": unparsed}
    return tally.scores(counts, figures(groups, counts, protocol), notes)


def figures(groups: Sequence[str], counts: Sequence[str], protocol: Protocol) -> dict[str, Figure]:
    """The accuracy over all questions; POPE's figures for yes/no kinds; the accuracy of each other kind."""
    one_word = [group for group in groups if f"{group}/right" in counts]
    table = {"accuracy": ratio(["right"], ["asked"])}
    table |= binary.table([group for group in groups if group not in one_word])
    return table | {f"{group}: accuracy": ratio([f"{group}/right"], [f"{group}/asked"]) for group in one_word}


BENCHMARK = Benchmark(
    name="mihbench",
    protocols=PROTOCOLS,
    links=("https://github.com/pgtrece/DAB", folders.COCO_LINK, "https://github.com/facebookresearch/co3d"),
    question_files=question_files,
    read=read,
    score=score,
    figures=figures,
    directions=binary.DIRECTIONS,
    headlines=("accuracy", "F1"),
    judged=(("accuracy",),),
    uses=("question_file", "image_folder", "groups"),
    answers=AnswerFormat(by_group=True),
    image_places=IMAGE_PLACES,
)
