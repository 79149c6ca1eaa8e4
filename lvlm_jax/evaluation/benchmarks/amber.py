"""AMBER (Wang et al. 2023, arXiv 2311.07397): descriptions (ids 1 to 1004), and yes/no questions on existence,
attribute and relation (ids to 15220).

Generative figures count the nouns of a description that are in AMBER's word lists:
  CHAIR  share of the nouns that are neither in the image nor harmless; repeats count
  Cover  share of the annotated objects that are named
  Hal    share of the descriptions with a noun that is neither in the image nor harmless
  Cog    share of the annotated temptations ("hallu") that are named
For discriminative figures, "No" is the positive class.

The official scorer finds nouns with nltk's tagger, and also accepts words that spaCy's large English vectors call
similar (above 0.8): this is the matching "spacy". Under "exact", nouns are those of AMBER's word lists, and only equal
words match. A plural in the lists ("sunglasses") is found; the official scorer makes it singular and never finds it.
"auto" is "spacy" if everything for it is installed. Notes and record say which was used. F1 is the harmonic mean; the
official scorer adds 0.0001 to the divisor.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import binary, folders, nltk_words, parsers
from lvlm_jax.evaluation.answers import AnswerFormat
from lvlm_jax.evaluation.benchmark import Benchmark
from lvlm_jax.evaluation.chair_words import singular, tokens
from lvlm_jax.evaluation.protocol import Protocol
from lvlm_jax.evaluation.question import Data, Question
from lvlm_jax.evaluation.scores import Figure, Scores, Tally, ratio

GENERATIVE = "generative"
# Types of AMBER's annotations -> the kind of their questions, and the dimension it belongs to.
KINDS = {
    "discriminative-hallucination": ("existence", "existence"),
    "discriminative-attribute-state": ("state", "attribute"),
    "discriminative-attribute-number": ("number", "attribute"),
    "discriminative-attribute-action": ("action", "attribute"),
    "discriminative-relation": ("relation", "relation"),
    "relation": ("relation", "relation"),
}
DISCRIMINATIVE = ("existence", "state", "number", "action", "relation")
SIMILARITY = 0.8
VECTORS = "en_core_web_lg"
MATCHINGS = ("auto", "exact", "spacy")
EXACT = (
    "only equal words match. AMBER's own scorer finds nouns with nltk and also matches words that spaCy's large "
    "English vectors call similar; a run published with CHAIR 7.5, Cover 50.9, Hal 37.3, Cog 3.2 gets 8.7, 51.7, 39.8, "
    "3.2 here. For that scorer's figures install spaCy, en_core_web_lg, and nltk with its data"
)
QUERIES = ("query_all.json",)
PLACES = (".", "data", "AMBER/data", "AMBER", "amber/data")
IMAGE_PLACES = ("image", "images", "AMBER/image", "AMBER/images", "data/image", "data/images", ".")


def _protocol(name: str, about: str, parser: str, groups: tuple[str, ...], length: int = 512) -> Protocol:
    return Protocol(f"amber/{name}", "amber", about, parser, length, groups=groups)


PROTOCOLS = (
    _protocol(
        "all", "descriptions and questions, answers exactly Yes or No (default)", "exact", (GENERATIVE, *DISCRIMINATIVE)
    ),
    _protocol("generative", "descriptions", "none", (GENERATIVE,)),
    _protocol("discriminative", "questions, answers exactly Yes or No", "exact", DISCRIMINATIVE, 16),
    _protocol("discriminative-strict", "questions, one yes/no word counts", "strict", DISCRIMINATIVE, 16),
)


def question_files(data: Data, protocol: Protocol) -> dict[str, list[Path]]:
    """Questions, annotations and AMBER's two word lists."""
    if data.question_file is not None:
        questions = files.existing_file(data.question_file, "question file")
    else:
        places = [f"{place}/query".removeprefix("./") for place in PLACES] + list(PLACES)
        questions = folders.find(data, QUERIES, places, "AMBER's question file")
    paths = {"questions": [questions]}
    for role, name in (
        ("annotations", "annotations.json"),
        ("association", "relation.json"),
        ("safe", "safe_words.txt"),
    ):
        paths[role] = [folders.find(data, [name], PLACES, f"AMBER's {name}")]
    return paths


def read(data: Data, protocol: Protocol, need_images: bool = False) -> list[Question]:
    """The questions of the protocol's kinds, in the order of the question file.

    Raises:
        LVLMError: a file or (with `need_images`) an image is missing, a row is malformed, an id occurs twice or has no
            annotation.
    """
    groups = folders.chosen_groups(data, protocol.groups, protocol.name, "kind")
    question_paths = question_files(data, protocol)
    association = files.read_json(question_paths["association"][0], "AMBER's relation.json")
    if not isinstance(association, dict) or not all(map(_are_words, association.values())):
        raise LVLMError(
            f"{str(question_paths['association'][0])!r} is not an object of word lists; expected AMBER's relation.json"
        )
    lists = {
        "association": association,
        "known": frozenset(association) | {word for words in association.values() for word in words},
        "safe": frozenset(files.read_text(question_paths["safe"][0], "AMBER's safe_words.txt").splitlines()),
        "matching": settled(data.matching),
    }
    similar_words(lists["matching"])  # fails early if something for it is not installed
    notes, listed_words = {}, set()
    for line, row in files.read_rows(question_paths["annotations"][0], "annotations"):
        where = f"entry {line} of {str(question_paths['annotations'][0])!r}"
        number = files.field(row, ["id"], int, where)
        files.unique(listed_words, number, where)
        notes[number] = row
    questions, seen_ids = [], set()
    for line, row in files.read_rows(question_paths["questions"][0], "question file"):
        where = f"entry {line} of question file {str(question_paths['questions'][0])!r}"
        number = files.field(row, ["id"], int, where)
        files.unique(seen_ids, number, where)
        if number not in notes:
            raise LVLMError(f"{where}: id {number} is not in {str(question_paths['annotations'][0])!r}")
        group, label, extra = _annotated(notes[number], number, lists)
        if group in groups:
            questions.append((number, files.field(row, ["image"], str, where),
                              files.field(row, ["query", "text"], str, where), label, group, extra))  # fmt: skip
    if not questions:
        raise LVLMError(f"question file {str(question_paths['questions'][0])!r} has no question of {', '.join(groups)}")
    paths = folders.locate_images(data, [row[1] for row in questions], IMAGE_PLACES, need_images, "AMBER")
    return [
        Question(number, (paths[image],), text, label, group, extra)
        for number, image, text, label, group, extra in questions
    ]


def _are_words(value) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _annotated(row: dict, number: int, lists: dict) -> tuple[str, str | None, dict]:
    where = f"annotation {number}"
    kind = files.field(row, ["type"], str, where)
    if kind != GENERATIVE:
        if kind not in KINDS:
            raise LVLMError(f"{where} has type {kind!r}; expected {GENERATIVE} or one of {', '.join(KINDS)}")
        label = files.field(row, ["truth"], str, where).strip().lower()
        if label not in ("yes", "no"):
            raise LVLMError(f"{where}: truth is {label!r}; expected yes or no")
        return KINDS[kind][0], label, {}
    truth, temptations = (files.field(row, [name], list, where) for name in ("truth", "hallu"))
    for word in (*truth, *temptations):
        if not isinstance(word, str) or word not in lists["association"]:
            raise LVLMError(f"{where} names {word!r}, which AMBER's relation.json does not list")
    return GENERATIVE, None, {"truth": tuple(truth), "temptations": tuple(temptations), "lists": lists}


def settled(matching: str) -> str:
    """The matching that will be used: "auto" becomes "spacy" if spaCy, its large English vectors, nltk and its data are
    installed."""
    if matching not in MATCHINGS:
        raise LVLMError(f"matching {matching!r} is unknown; choose {', '.join(MATCHINGS)}")
    if matching != "auto":
        return matching
    installed = all(importlib.util.find_spec(name) is not None for name in ("spacy", VECTORS))
    return "spacy" if installed and nltk_words.have("amber") else "exact"


@functools.cache
def similar_words(matching: str) -> Callable[[str, str], bool]:
    """A function that says whether two different words mean the same: never under "exact", by spaCy's vectors under
    "spacy".

    Raises:
        LVLMError: spaCy, its large English vectors, nltk or its data are not installed.
    """
    if matching == "exact":
        return lambda first, second: False
    nltk_words.require("amber under --matching spacy", "--matching exact")
    try:
        import spacy

        vectors = spacy.load(VECTORS)
    except (ImportError, OSError) as error:
        raise LVLMError(
            f"matching 'spacy' needs the packages spacy and {VECTORS}; run: pip install \"lvlm_jax[amber]\" && "
            f"python -m spacy download {VECTORS}, or choose --matching exact"
        ) from error
    parsed = functools.cache(vectors)
    return functools.cache(lambda first, second: parsed(first).similarity(parsed(second)) > SIMILARITY)


def _nouns(text: str, lists: Mapping) -> list[str]:
    """The nouns of a text that are in AMBER's word lists."""
    if lists["matching"] == "spacy":
        nouns_found = nltk_words.nouns(text)
    else:
        nouns_found = (singular(token, lists["known"]) for token in tokens(text))
    return [noun for noun in nouns_found if noun in lists["known"]]


def _first(noun: str, words: Sequence[str], association: Mapping, same: Callable) -> int | None:
    """Index in `words` of the word that `noun` belongs to. Associated words come first, as in AMBER's scorer."""
    for i, word in enumerate(words):
        if any(same(noun, other) for other in association[word]):
            return i
    return next((i for i, word in enumerate(words) if same(noun, word)), None)


def nouns_judged(question: Question, text: str) -> tuple[list[tuple[str, bool]], set[int], set[int]]:
    """The nouns in order, each with whether it is hallucinated; and indices of the named objects and temptations."""
    lists, truth, temptations = (question.extra[name] for name in ("lists", "truth", "temptations"))
    association, similar = lists["association"], similar_words(lists["matching"])

    def equal(first: str, second: str) -> bool:
        return first == second

    judged, covered, tempted = [], set(), set()
    for noun in _nouns(text, lists):
        if noun in lists["safe"]:
            judged.append((noun, False))
            continue
        place = _first(noun, truth, association, equal)
        if place is None:
            for same in (equal, similar):
                temptation = _first(noun, temptations, association, same)
                if temptation is not None:
                    tempted.add(temptation)
            place = _first(noun, truth, association, similar)
        if place is not None:
            covered.add(place)
        judged.append((noun, place is None))
    return judged, covered, tempted


DESCRIBED = ("descriptions", "hallucinated", "nouns", "wrong", "objects", "covered", "temptations", "tempted")


def score(questions: Sequence[Question], answers: Mapping, protocol: Protocol) -> Scores:
    """Figures of the descriptions, of all yes/no questions, and of each dimension and kind of questions."""
    tally, unparsed = Tally(), 0
    groups = list(dict.fromkeys(question.group for question in questions))
    described = [question for question in questions if question.group == GENERATIVE]
    yes_no_questions = [question for question in questions if question.group != GENERATIVE]
    for question in described:
        judged, covered, tempted = nouns_judged(question, answers[question.key])
        wrong = sum(hallucinated for _, hallucinated in judged)
        tally.add(
            question.unit,
            descriptions=1,
            hallucinated=wrong > 0,
            nouns=len(judged),
            wrong=wrong,
            objects=len(question.extra["truth"]),
            covered=len(covered),
            temptations=len(question.extra["temptations"]),
            tempted=len(tempted),
        )
        tally.correct[question.key] = wrong == 0
    parse = parsers.yes_no(protocol.parser) if yes_no_questions else None
    for question in yes_no_questions:
        reply = parse(answers[question.key], binary.label_of(question))
        unparsed += reply is None
        for prefix in _prefixes([question.group]):
            binary.count(tally, question, reply, "no", prefix)
    counts = [*(DESCRIBED if described else ()), *binary.names(_prefixes(groups))]
    notes = {"parser": protocol.parser, "unparsed": unparsed}
    if described:
        notes["matching"] = described[0].extra["lists"]["matching"]
        if notes["matching"] == "exact":
            notes["exact matching"] = EXACT
    return tally.scores(counts, figures(groups, counts, protocol), notes)


def _prefixes(groups: Sequence[str]) -> list[str]:
    """The prefixes of counts for questions of these kinds: "discriminative" for all, the dimensions, and the kinds."""
    dimensions = {kind: dimension for kind, dimension in KINDS.values()}
    kinds = [group for group in groups if group != GENERATIVE]
    return list(dict.fromkeys(name for kind in kinds for name in ("discriminative", dimensions[kind], kind)))


def figures(groups: Sequence[str], counts: Sequence[str], protocol: Protocol) -> dict[str, Figure]:
    """The four figures of descriptions, and the yes/no figures of all questions, each dimension and each kind."""
    table: dict[str, Figure] = {}
    if GENERATIVE in groups:
        table = {
            "CHAIR": ratio(["wrong"], ["nouns"]),
            "Cover": ratio(["covered"], ["objects"]),
            "Hal": ratio(["hallucinated"], ["descriptions"]),
            "Cog": ratio(["tempted"], ["temptations"]),
        }
    for prefix in _prefixes(groups):
        table |= binary.table([prefix], "no")
    return table


BENCHMARK = Benchmark(
    name="amber",
    protocols=PROTOCOLS,
    links=("https://github.com/junyangwang0410/AMBER (data/; its README links the images)",),
    question_files=question_files,
    read=read,
    score=score,
    figures=figures,
    directions=binary.DIRECTIONS | {"CHAIR": -1, "Cover": 1, "Hal": -1, "Cog": -1},
    headlines=("CHAIR", "Cover", "Hal", "Cog", "discriminative: accuracy", "discriminative: F1"),
    judged=(("accuracy",), ("Hal",)),
    uses=("question_file", "image_folder", "groups", "matching"),
    recorded=("matching",),
    answers=AnswerFormat("answers.json", columns=("id", "response")),
    image_places=IMAGE_PLACES,
    descriptions=(GENERATIVE,),
    narrow=lambda data, rows: dataclasses.replace(data, matching=settled(data.matching)),
)
