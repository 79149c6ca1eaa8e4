"""Objects named in a caption, by the word rules of CHAIR (Rohrbach et al. 2018, arXiv 1809.02156).

The rules: words are lower-cased and reduced to their base form; some pairs of words are one object ("hot dog", "teddy
bear"); "baby bird" is a bird and not a person; a "seat" beside a toilet is not a chair; a word of the synonym list
stands for the first category of its line.

A "reading" is a way to reduce words to their base form:

    nltk    nltk's tagger and WordNet, as in the published scorer (`nltk_words`)
    verbs   without nltk: nouns become singular, and verb forms of a listed word count as the word ("seated" is a seat,
            "skiing" is skis), except an -ing form that a determiner makes a noun ("a comfortable seating area"). Like
            the published scorer, this reading finds no person in "men" and no vase in "vases".
    nouns   nouns become singular, nothing else changes, as in the scorer of 2018

`repair=False` keeps the errors of the common synonym list, because published figures contain them: words with a leading
blank, a capital letter, or of three words never match; an empty line makes an empty word (which no text contains).
"""

import dataclasses
import re
from collections.abc import Container, Iterable, Mapping
from collections.abc import Set as AbstractSet

from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import nltk_words

READINGS = ("nltk", "verbs", "nouns")

# Pairs that are one word. The last two are not objects, and keep their second word from being one.
PAIRS = (
    "motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal", "stop light",
    "fire hydrant", "stop sign", "parking meter", "suit case", "sports ball", "baseball bat", "baseball glove",
    "tennis racket", "wine glass", "hot dog", "cell phone", "mobile phone", "teddy bear", "hair drier",
    "potted plant", "laptop computer", "home plate", "train track",
)  # fmt: skip
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
VEHICLES = ("jet", "train")
DOUBLE_WORDS = (
    {pair: pair for pair in PAIRS}
    | {f"{age} {animal}": animal for age in ("baby", "adult") for animal in ANIMALS}
    | {f"passenger {vehicle}": vehicle for vehicle in VEHICLES}
    # A naive singular of "wine glass" is "wine glas".
    | {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}
)

_IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose", "feet": "foot",
    "teeth": "tooth", "oxen": "ox", "people": "person", "dice": "die", "lice": "louse", "leaves": "leaf",
    "grandchildren": "grandchild",
}  # fmt: skip
# Base forms of WordNet's lemmatiser, and so of the published scorer.
_AS_PUBLISHED = {"men": "men", "vases": "vas"}
_DETERMINERS = frozenset(
    "a an the this that these those some any no each every another his her its their my your our 's".split()
)
# A verb of one short syllable doubles its last letter ("cupped"), so "cared" is not a form of "car".
_SHORT = re.compile(r"[^aeiou]*[aeiou][^aeiouwxy]")
# Parts that an English tokenizer splits from the word before.
_ENDINGS = re.compile(r"(n't|'(?:s|re|ve|ll|d|m))$")
_TOKEN = re.compile(r"\w+(?:[-/'’]\w+)*|[^\w\s]")


def tokens(text: str) -> list[str]:
    """Words and punctuation marks of a text; case stays. "dog's" is two words, "black-and-white" is one."""
    words = []
    for token in _TOKEN.findall(text):
        token = token.replace("’", "'")
        ending = _ENDINGS.search(token.lower())
        if ending and ending.start():
            words += [token[: ending.start()], token[ending.start() :]]
        else:
            words.append(token)
    return words


def singular(word: str, known: AbstractSet[str]) -> str:
    """The singular of a word: the word itself if `known`, else the first known of its possible singulars, else a guess.

    Trying the known words first avoids rules for "bus", "scissors" and "skis".
    """
    if word in known:
        return word
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    candidates = []
    if word.endswith("men"):
        candidates.append(word[:-3] + "man")
    if word.endswith("ies"):
        candidates.append(word[:-3] + "y")
    if word.endswith("ves"):
        candidates += [word[:-3] + "f", word[:-3] + "fe"]
    if re.search(r"(s|x|z|ch|sh|o)es$", word):
        candidates.append(word[:-2])
    # "taxis" and "zebus" are plurals if "taxi" and "zebu" are known; few other words have these endings.
    if word.endswith("s") and len(word) > 2 and (word[:-1] in known or not re.search(r"(ss|us|is)$", word)):
        candidates.append(word[:-1])
    return next((candidate for candidate in candidates if candidate in known), (candidates or [word])[0])


def verb_stem(word: str, objects: Container[str]) -> str | None:
    """The object whose name, used as a verb, has this form in -ed or -ing; None if there is none."""
    match = re.fullmatch(r"(.+?)(ed|ing)", word)
    if match is None:
        return None
    base = match[1]
    candidates = [base + "e"] if _SHORT.fullmatch(base) else [base, base + "e"]
    if base[-1:] == "i" and match[2] == "ed":  # tied
        candidates = [base + "e", base[:-1] + "y"]
    if base[-1:] == "y" and match[2] == "ing":  # tying
        candidates.append(base[:-1] + "ie")
    if base[-2:-1] == base[-1:]:  # cupped
        candidates.append(base[:-1])
    return next((candidate for candidate in candidates if candidate in objects), None)


@dataclasses.dataclass(frozen=True)
class Lexicon:
    """Maps words to categories.

    Attributes:
        categories: word, or pair of words, -> category.
        double_words: pair of words -> the word that replaces it.
        origin: the source of the list, for the record.
    """

    categories: Mapping[str, str]
    double_words: Mapping[str, str]
    origin: str

    def __post_init__(self):
        parts = {part for entry in (*self.categories, *self.double_words) for part in entry.split()}
        object.__setattr__(self, "_known", frozenset(parts | set(self.categories)))

    def words(self, text: str, reading: str = "nouns") -> list[str]:
        """Words of a text in lower case and base form, with pairs joined; punctuation marks included.

        Args:
            reading: one of `READINGS`, see the module docstring.
        """
        single = nltk_words.lemmas(text) if reading == "nltk" else self._lemmas(text, reading == "verbs")
        joined, i = [], 0
        while i < len(single):
            pair = " ".join(single[i : i + 2])
            if pair in self.double_words:
                joined.append(self.double_words[pair])
                i += 2
            else:
                joined.append(single[i])
                i += 1
        return joined

    def _lemmas(self, text: str, verbs: bool) -> list[str]:
        words_found = tokens(text.lower())
        if not verbs:
            return [singular(word, self._known) for word in words_found]
        lemmas: list[str] = []
        for place, word in enumerate(words_found):
            stem = None if word in self._known else verb_stem(word, self.categories)
            if stem is None or (word.endswith("ing") and self._is_noun(words_found[max(place - 2, 0) : place])):
                stem = _AS_PUBLISHED.get(word) or singular(word, self._known)
            lemmas.append(stem)
        return lemmas

    def _is_noun(self, before: list[str]) -> bool:
        """Whether an -ing form is a noun, judged by the words before: a determiner, with or without an adjective."""
        if not before or before[-1] in _DETERMINERS:
            return bool(before)
        return before[0] in _DETERMINERS and singular(before[-1], self._known) not in self.categories

    def mentions(self, words: Iterable[str]) -> list[tuple[str, str]]:
        """(word, category) of every object named, in order, with repeats; `words` are a result of `self.words`."""
        words = list(words)
        if "toilet" in words and "seat" in words:
            words = [word for word in words if word != "seat"]
        return [(word, self.categories[word]) for word in words if word in self.categories]


def parse_synonyms(text: str, repair: bool, origin: str) -> Lexicon:
    """Parses a synonym list: one category per line, words separated by a comma and a blank.

    Args:
        repair: whether to correct blanks and capitals, and to treat pairs of words as one word even if CHAIR's own
            list of pairs lacks them.
        origin: source of the list, for the record.

    Raises:
        LVLMError: a word stands for two categories, or there are no categories.
    """
    categories: dict[str, str] = {}
    double_words = dict(DOUBLE_WORDS)
    for number, line in enumerate(text.splitlines(), start=1):
        entries = [word.strip().lower() for word in line.split(",")] if repair else line.strip().split(", ")
        entries = [word for word in entries if word]
        for word in entries:
            category = categories.setdefault(word, entries[0])
            if category != entries[0]:
                raise LVLMError(
                    f"line {number} of the synonym list gives {word!r} to {entries[0]!r}, an earlier one to "
                    f"{category!r}; "
                    "a word stands for one category"
                )
            if repair and word.count(" ") == 1:
                double_words.setdefault(word, word)
    if not categories:
        raise LVLMError("the synonym list names no category; expected one a line, words separated by commas")
    return Lexicon(categories, double_words, origin)


def plain_lexicon(categories: Iterable[str]) -> Lexicon:
    """The lexicon of category names alone, for use without a synonym list; names of two words count as pairs."""
    categories = list(categories)
    pairs = {name: name for name in categories if name.count(" ") == 1}
    return Lexicon({name: name for name in categories}, DOUBLE_WORDS | pairs, "category names, no synonyms")
