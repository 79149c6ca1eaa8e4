"""CHAIR: objects in captions that are not in the image (Rohrbach et al. 2018, arXiv 1809.02156).

C_S: share of captions with a hallucinated object. C_I: hallucinated mentions over all mentions, repeats counted.
Recall: share of ground-truth objects that are named, over all images; coverage: the same share per image, averaged. F1:
harmonic mean of 1 - C_I and recall; F1 (distinct): harmonic mean of the precision of distinct objects and recall.
Length counts joined words and punctuation marks, as CHAIR's scorer does; the figure "words" omits the marks.
Distinct-1 and distinct-2: share of a caption's words, and of its pairs of neighbours, that are distinct, averaged over
captions; they are low for repetitive captions.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import folders, nltk_words, parsers
from lvlm_jax.evaluation.answers import AnswerFormat, AnswerRow
from lvlm_jax.evaluation.benchmark import Benchmark
from lvlm_jax.evaluation.chair_truth import annotation_files, read_annotations, read_chair_pickle
from lvlm_jax.evaluation.chair_words import tokens
from lvlm_jax.evaluation.protocol import Protocol
from lvlm_jax.evaluation.question import Data, Question
from lvlm_jax.evaluation.scores import Figure, Scores, Tally, combined, divide, ratio
from lvlm_jax.generation.questions import VICUNA

DESCRIBE = "Please describe this image in detail."
HELP_DESCRIBE = "Please help me describe the image in detail."
GROUP = "captions"


def _protocol(name: str, about: str, reading: str, length: int, text: str = DESCRIBE, **settings) -> Protocol:
    return Protocol(f"chair/{name}", "chair", about, reading, length, template=text, groups=(GROUP,), **settings)


LIKE_IT = "words without nltk: C_S within 0.2, C_I within 0.1 of opera's on captions of four models"
PROTOCOLS = (
    _protocol("512", f"512 tokens; {LIKE_IT} (default)", "verbs", 512),
    _protocol("opera-512", "OPERA's scorer (nltk) and prompts, 512 tokens", "nltk", 512, system=VICUNA),
    _protocol(
        "opera-64",
        "OPERA's scorer (nltk) and prompts, 64 tokens, the unfinished last sentence dropped",
        "nltk",
        64,
        truncate="sentence",
        system=VICUNA,
    ),
    _protocol(
        "pai-512", "OPERA's scorer (nltk), prompt 'Please help me describe ...', 512 tokens", "nltk", 512, HELP_DESCRIBE
    ),
    _protocol(
        "64-sentence", f"64 tokens, the unfinished last sentence dropped; {LIKE_IT}", "verbs", 64, truncate="sentence"
    ),
    _protocol("64", f"64 tokens, nothing dropped; {LIKE_IT}", "verbs", 64),
    _protocol("1024", f"1024 tokens; {LIKE_IT}", "verbs", 1024),
    _protocol(
        "repaired-512",
        "512 tokens, no nltk; only nouns name objects, 'men' and 'vases' too, errors of the synonym list corrected",
        "nouns",
        512,
        synonym_list="repaired",
    ),
    _protocol("pocket", "pocket world: 160 tokens, only nouns name objects", "nouns", 160),
)
WITHOUT_NLTK = "chair/512 or chair/64-sentence, which give similar figures without nltk"


def image_id(name: str | int) -> int:
    """COCO's id of an image: the number itself, or the last digits in a file name."""
    digits = re.findall(r"\d+", Path(str(name)).stem)
    if not digits:
        raise LVLMError(f"image {name!r} has no number in its name; expected an id or a COCO file name")
    return int(digits[-1])


def read_image_list(path: Path) -> list[str]:
    """Reads the names or ids of an image list: one per line, a JSON list, or JSON objects with image or image_id."""
    path = files.existing_file(path, "image list")
    text = files.read_text(path, "image list").strip()
    if text.startswith("["):
        rows = files.read_json(path, "image list")
    else:
        rows = [line.strip() for line in text.splitlines() if line.strip()]
    if text.startswith("{") or any(isinstance(row, dict) for row in rows):
        rows = [
            files.field(row, ["image", "image_id", "file_name"], (str, int), f"line {line} of image list {str(path)!r}")
            for line, row in files.read_rows(path, "image list")
        ]
    if not rows:
        raise LVLMError(f"image list {str(path)!r} is an empty list; expected names or ids of images")
    return [str(row) for row in rows]


def question_files(data: Data, protocol: Protocol) -> dict[str, list[Path]]:
    """The files that determine the figures, by role: image list, ground truth, synonyms."""
    if data.chair_pickle is not None:
        paths = {"chair_pickle": [files.existing_file(data.chair_pickle, "chair.pkl")]}
    else:
        paths = annotation_files(data)
    for role in ("image_list", "synonyms"):
        path = getattr(data, role)
        if path is not None:
            paths[role] = [files.existing_file(path, role.replace("_", " "))]
    return paths


def read(data: Data, protocol: Protocol, need_images: bool = False) -> list[Question]:
    """One question per image: per image of the image list, else of `data.only`, else of the annotations.

    Raises:
        LVLMError: files are missing or malformed; an image is listed twice, or has no annotation; or nltk, which the
            protocol needs, is not installed.
    """
    folders.chosen_groups(data, protocol.groups, "CHAIR")
    if protocol.parser == "nltk":
        nltk_words.require(protocol.name, WITHOUT_NLTK)
    names = read_image_list(data.image_list) if data.image_list is not None else None
    ids = [image_id(name) for name in names] if names is not None else None
    if ids is None and data.only is not None:
        ids = list(data.only)
    keys: set = set()
    for number in ids or ():
        files.unique(keys, number, "image list")
    if data.chair_pickle is not None:
        by_id, lexicon = read_chair_pickle(files.existing_file(data.chair_pickle, "chair.pkl"))
        if ids is None:
            raise LVLMError("a chair.pkl does not say which images to describe; give an image list too")
        if not keys & by_id.keys():
            raise LVLMError(f"none of the {len(ids)} images is in the chair.pkl, first {ids[0]}; check their ids")
        # The pickle has no file names, and leaves out images without any object.
        truth = {number: (f"COCO_val2014_{number:012d}.jpg", by_id.get(number, frozenset())) for number in ids}
    else:
        needed_ids = keys if ids is not None else None
        truth, lexicon = read_annotations(data, protocol.synonym_list, protocol.parser, needed_ids)
    if ids is None:
        ids = sorted(truth)
    unknown = [number for number in ids if number not in truth]
    if unknown:
        raise LVLMError(f"{len(unknown)} of {len(ids)} images are not in the annotations, first {unknown[0]}")
    paths = folders.locate_images(data, [truth[number][0] for number in ids], folders.COCO_IMAGES, need_images, "CHAIR")
    return [
        Question(number, (paths[truth[number][0]],), "", None, GROUP, {"objects": truth[number][1], "lexicon": lexicon})
        for number in ids
    ]


@dataclasses.dataclass(frozen=True)
class Caption:
    """The words and objects of a caption.

    Attributes:
        words: base forms, pairs joined, punctuation marks included.
        mentions: (word, category, whether it is hallucinated) of every object named, in order.
        plain: the original words, in lower case, without punctuation marks.
    """

    words: list[str]
    mentions: list[tuple[str, str, bool]]
    plain: list[str]


def read_caption(question: Question, caption: str, protocol: Protocol) -> Caption:
    """Splits a caption, cut by the protocol's truncation rule, into words and objects."""
    lexicon, objects = question.extra["lexicon"], question.extra["objects"]
    text = parsers.truncated(caption, protocol.truncate)
    words = lexicon.words(text, protocol.parser)
    mentions = [(word, category, category not in objects) for word, category in lexicon.mentions(words)]
    return Caption(words, mentions, [word for word in tokens(text.lower()) if word[0].isalnum()])


def distinct(words: Sequence[str], n: int) -> float:
    """The share of the runs of n words that are distinct; 0 if there are fewer than n words."""
    runs = list(zip(*(words[start:] for start in range(n)), strict=False))
    return len(set(runs)) / len(runs) if runs else 0.0


COUNTS = ("captions", "hallucinated", "mentions", "hallucinated_mentions", "objects", "covered", "named",
          "length", "words", "coverage", "with_objects", "distinct_1", "distinct_2", "with_words",
          "with_pairs")  # fmt: skip


def score(questions: Sequence[Question], answers: Mapping, protocol: Protocol) -> Scores:
    """All figures of the captions; `correct` says whether a caption has no hallucinated object."""
    tally = Tally()
    for question in questions:
        caption = read_caption(question, answers[question.key], protocol)
        objects = question.extra["objects"]
        categories = {category for _, category, _ in caption.mentions}
        wrong = sum(hallucinated for _, _, hallucinated in caption.mentions)
        tally.add(
            question.unit,
            captions=1,
            hallucinated=wrong > 0,
            mentions=len(caption.mentions),
            hallucinated_mentions=wrong,
            objects=len(objects),
            covered=len(categories & objects),
            named=len(categories),
            length=len(caption.words),
            words=sum(word[0].isalnum() for word in caption.words),
            coverage=len(categories & objects) / len(objects) if objects else 0,
            with_objects=bool(objects),
            distinct_1=distinct(caption.plain, 1),
            distinct_2=distinct(caption.plain, 2),
            with_words=len(caption.plain) > 0,
            with_pairs=len(caption.plain) > 1,
        )
        tally.correct[question.key] = wrong == 0
    lexicon = questions[0].extra["lexicon"] if questions else None
    notes = {
        "words": lexicon.origin if lexicon else "",
        "reading": protocol.parser,
        "synonym_list": protocol.synonym_list,
        "truncate": protocol.truncate,
        "without_ground_truth": sum(not question.extra["objects"] for question in questions),
    }
    return tally.scores(COUNTS, figures((GROUP,), COUNTS, protocol), notes)


def figures(groups: Sequence[str], counts: Sequence[str], protocol: Protocol) -> dict[str, Figure]:
    """CHAIR's figures, and the length of the captions, on which they depend."""
    recall = ratio(["covered"], ["objects"])
    faithful = Figure(lambda totals: 1 - divide(totals["hallucinated_mentions"], totals["mentions"]), ("mentions",))
    return {
        "C_S": ratio(["hallucinated"], ["captions"]),
        "C_I": ratio(["hallucinated_mentions"], ["mentions"]),
        "recall": recall,
        "F1": combined([faithful, recall], _harmonic, "share"),
        "F1 (distinct)": combined([ratio(["covered"], ["named"]), recall], _harmonic, "share"),
        "coverage": ratio(["coverage"], ["with_objects"]),
        "length": ratio(["length"], ["captions"], "tokens"),
        "words": ratio(["words"], ["captions"], "words"),
        "distinct-1": ratio(["distinct_1"], ["with_words"]),
        "distinct-2": ratio(["distinct_2"], ["with_pairs"]),
    }


def _harmonic(values: np.ndarray) -> np.ndarray:
    """Harmonic mean of two shares [2, ...]; 0 if both are 0."""
    sums = values.sum(axis=0)
    return np.where(sums == 0, 0.0, divide(2 * values[0] * values[1], np.where(sums == 0, 1.0, sums)))


# COCO's number of an image: alone, zero-padded, or in a file name.
_COCO_NAME = re.compile(r"(?:\w*_)?0*(\d+)(?:\.(?:jpg|jpeg|png))?", re.ASCII)


def _number(written: str) -> str:
    """The number of an image as the questions have it; a name without a number is returned unchanged."""
    match = _COCO_NAME.fullmatch(written)
    return match[1] if match else written


def captioned(data: Data, rows: Sequence[AnswerRow]) -> Data:
    """The data with the ids of the captioned images in `only`; unchanged if there is an image list.

    Raises:
        LVLMError: a caption has no image, or an image has two captions.
    """
    if data.image_list is not None:
        return data
    numbers: set[int] = set()
    for row in rows:
        if not (row.id.isdecimal() and row.id.isascii() and len(row.id) < 19):
            raise LVLMError(f"{row.where}: image_id is {row.id!r}; expected COCO's number")
        files.unique(numbers, int(row.id), row.where)
    return dataclasses.replace(data, only=tuple(int(row.id) for row in rows))


BENCHMARK = Benchmark(
    name="chair",
    protocols=PROTOCOLS,
    links=(
        "https://cocodataset.org/#download (2014 Train/Val annotations: annotations_trainval2014.zip)",
        folders.COCO_LINK,
        "https://github.com/LisaAnne/Hallucination/blob/master/data/synonyms.txt (--synonyms)",
        "https://github.com/shikiw/OPERA (its chair.py makes a chair.pkl; captions in log/chair_eval_results)",
    ),
    question_files=question_files,
    read=read,
    score=score,
    figures=figures,
    directions={"C_S": -1, "C_I": -1, "recall": 1, "F1": 1, "F1 (distinct)": 1, "coverage": 1},
    headlines=("C_S", "C_I", "recall", "F1", "words"),
    judged=(("C_S",),),
    uses=("image_folder", "image_list", "synonyms", "chair_pickle", "groups", "only"),
    answers=AnswerFormat(columns=("image_id", "caption"), identity=_number),
    image_places=folders.COCO_IMAGES,
    descriptions=(GROUP,),
    narrow=captioned,
)
