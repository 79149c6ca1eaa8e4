"""POPE: is this object in the image, yes or no (Li et al. 2023, arXiv 2305.10355).

Question files are JSON lines of `question_id, image, text, label`; their name often ends in `.json`. There are two COCO
files of the random split, with 3000 rows (VCD's) and with 2910 (OPERA's and LLaVA's): the record's hash and the note
"rows" distinguish them. The yes ratio is the share of yes among the answers; lmms-eval prints the share among the
labels under this name.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import binary, folders, parsers
from lvlm_jax.evaluation.answers import AnswerFormat
from lvlm_jax.evaluation.benchmark import Benchmark
from lvlm_jax.evaluation.protocol import LLAVA_SUFFIX, Protocol
from lvlm_jax.evaluation.question import Data, Question
from lvlm_jax.evaluation.scores import Figure, Scores, Tally, ratio
from lvlm_jax.generation.questions import VICUNA

SPLITS = ("random", "popular", "adversarial")
SOURCES = ("coco", "aokvqa", "gqa")
ENDINGS = (".json", ".jsonl")
VCD_SUFFIX = " Please answer this question with one word."


def _protocol(name: str, about: str, parser: str, max_new_tokens: int, **settings) -> Protocol:
    return Protocol(f"pope/{name}", "pope", about, parser, max_new_tokens, groups=SPLITS, **settings)


PROTOCOLS = (
    _protocol("strict", "one yes/no word counts, anything else is wrong (default)", "strict", 16, suffix=LLAVA_SUFFIX),
    _protocol("official", "POPE's and LLaVA's scorer, LLaVA's suffix", "official", 128, suffix=LLAVA_SUFFIX),
    _protocol("opera", "OPERA's scorer and system prompt, no suffix", "opera", 10, system=VICUNA),
    _protocol(
        "vcd",
        "VCD's scorer, suffix and system prompt, sampling at temperature 1",
        "vcd",
        64,
        suffix=VCD_SUFFIX,
        temperature=1.0,
        system=VICUNA,
    ),
    _protocol(
        "vcd-greedy", "VCD's scorer, suffix and system prompt, greedy", "vcd", 64, suffix=VCD_SUFFIX, system=VICUNA
    ),
    _protocol("lmms-eval", "lmms-eval's scorer, LLaVA's suffix", "lmms-eval", 128, suffix=LLAVA_SUFFIX),
    _protocol("pocket", "pocket world: no suffix, one yes/no word counts", "strict", 16),
)


def question_files(data: Data, protocol: Protocol) -> dict[str, list[Path]]:
    """Split -> its question file. A file that the user names has one split, which its name or `groups` contains."""
    if data.source not in SOURCES:
        raise LVLMError(f"POPE source {data.source!r} is unknown; choose one of {', '.join(SOURCES)}")
    groups = folders.chosen_groups(data, protocol.groups, "POPE", "split")
    if data.question_file is not None:
        path = files.existing_file(data.question_file, "question file")
        splits = [group for group in groups if group in path.name.lower()]
        groups = tuple(splits) if len(splits) == 1 else groups
        if len(groups) > 1:
            raise LVLMError(f"question file {str(path)!r} has one split; say which: {', '.join(groups)}")
        return {groups[0]: [path]}
    source = data.source
    nested = (source, f"pope_{source}", f"output/{source}", f"output/seem/{source}")
    places = [".", "POPE", "pope", *(top + place for top in ("", "POPE/", "pope/") for place in nested),
              f"data/POPE/{source}", f"experiments/data/POPE/{source}"]  # fmt: skip
    paths = {}
    for group in groups:
        stems = [f"{source}_pope_{group}"] + [f"pope_{group}"] * (source == "coco")
        file_names = [stem + ending for stem in stems for ending in ENDINGS]
        # SEEM segmented the objects of A-OKVQA and GQA; older copies of their files have it in the name.
        older = [f"{source}_pope_seem_{group}{ending}" for ending in ENDINGS if source != "coco"]
        what = f"POPE {source} {group}"
        path = folders.find(data, file_names, places, what, optional=True)
        paths[group] = [path or folders.find(data, file_names + older, places, what)]
    return paths


def read(data: Data, protocol: Protocol, need_images: bool = False) -> list[Question]:
    """The questions of all chosen splits, in the order of the files.

    Raises:
        LVLMError: a file or (with `need_images`) an image is missing, a row is malformed, or an id occurs twice.
    """
    rows, ids = [], set()
    for group, (path,) in question_files(data, protocol).items():
        for line, row in files.read_rows(path, "question file"):
            where = f"line {line} of question file {str(path)!r}"
            number = files.field(row, ["question_id"], (int, str), where)
            files.unique(ids, (group, str(number)), where)
            label = files.field(row, ["label"], str, where)
            if label.strip().lower() not in ("yes", "no"):
                raise LVLMError(f"{where}: label is {label!r}; expected yes or no")
            rows.append((group, number, files.field(row, ["image"], str, where),
                         files.field(row, ["text"], str, where), label.strip().lower()))  # fmt: skip
    places = folders.GQA_IMAGES if data.source == "gqa" else folders.COCO_IMAGES
    paths = folders.locate_images(data, [row[2] for row in rows], places, need_images, "POPE")
    return [Question(number, (paths[image],), text, label, group) for group, number, image, text, label in rows]


def score(questions: Sequence[Question], answers: Mapping, protocol: Protocol) -> Scores:
    """Figures of each split and their mean.

    Besides the figures by the protocol's own parser, "strict yes ratio" and "strict unparsed" show the real answers,
    because some parsers read every text as yes or no.

    Args:
        questions: the questions.
        answers: `Question.key` -> text.
    """
    parse = parsers.yes_no(protocol.parser)
    groups = list(dict.fromkeys(question.group for question in questions))
    tally = Tally()
    for question in questions:
        text = answers[question.key]
        binary.count(tally, question, parse(text, binary.label_of(question)))
        plain = parsers.strict(text, "")
        tally.add(question.unit, asked=1, strict_yes=plain == "yes", strict_unparsed=plain is None)
    counts = [*binary.names(groups), "asked", "strict_yes", "strict_unparsed"]
    unparsed = sum(parse(answers[question.key], binary.label_of(question)) is None for question in questions)
    rows = {group: sum(question.group == group for question in questions) for group in groups}
    notes = {"rows": rows, "parser": protocol.parser, "unparsed": unparsed}
    return tally.scores(counts, figures(groups, counts, protocol), notes)


def figures(groups: Sequence[str], counts: Sequence[str], protocol: Protocol) -> dict[str, Figure]:
    """Figures of each split and their mean, by the protocol's parser, and how many answers are neither yes nor no."""
    return binary.table(groups, unparsed_is_missed=protocol.parser != "lmms-eval") | {
        "strict yes ratio": ratio(["strict_yes"], ["asked"]),
        "strict unparsed": ratio(["strict_unparsed"], ["asked"]),
    }


BENCHMARK = Benchmark(
    name="pope",
    protocols=PROTOCOLS,
    links=(
        "https://github.com/AoiDragon/POPE (output/coco; random has 2910 questions)",
        "https://github.com/DAMO-NLP-SG/VCD (experiments/data/POPE: coco, aokvqa, gqa; random has 3000)",
        folders.COCO_LINK,
        "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip (for --source gqa)",
    ),
    question_files=question_files,
    read=read,
    score=score,
    figures=figures,
    directions=binary.DIRECTIONS | {"strict unparsed": -1},
    headlines=("accuracy", "F1", "yes ratio", "unparsed"),
    judged=(("accuracy",),),
    uses=("question_file", "image_folder", "source", "groups"),
    recorded=("source",),
    # LLaVA's scorer has the three splits in one file.
    answers=AnswerFormat(by_group=True, in_order=True, repeats=True, blocks=("adversarial", "random", "popular")),
    image_places=(*folders.COCO_IMAGES, *folders.GQA_IMAGES),
)
