"""Objects named in a caption, by the word rules of CHAIR (Rohrbach et al. 2018, arXiv 1809.02156), without nltk.

The rules: words are lower-cased and made singular; some pairs of words are one object ("hot dog", "teddy bear");
"baby bird" is a bird and no person; a "seat" beside a toilet is no chair; a word of the synonym list stands for the
category that begins its line.

Only nouns are made singular. Scorers that bring verbs to their ground form as well (OPERA's, with nltk's tagger) find
skis in "skiing"; the original one does not, nor does this one.

Slips of the list that circulates, kept by `repair=False` because published figures have them: words written with a
leading blank, a capital letter, or as three words never match; an empty line makes an empty word (which no text holds).
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet

from lvlm_jax.errors import LVLMError

# Pairs that are one word. The last two name no object and keep their second word from naming one.
PAIRS = (
    "motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal", "stop light",
    "fire hydrant", "stop sign", "parking meter", "suit case", "sports ball", "baseball bat", "baseball glove",
    "tennis racket", "wine glass", "hot dog", "cell phone", "mobile phone", "teddy bear", "hair drier",
    "potted plant", "laptop computer", "home plate", "train track",
)  # fmt: skip
ANIMALS = (
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "animal",
    "cub",
)
VEHICLES = ("jet", "train")
DOUBLE_WORDS = (
    {pair: pair for pair in PAIRS}
    | {f"{age} {animal}": animal for age in ("baby", "adult") for animal in ANIMALS}
    | {f"passenger {vehicle}": vehicle for vehicle in VEHICLES}
    # "wine glas" is what a singulariser makes of "wine glass" that takes the last s for a plural.
    | {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}
)

_IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose", "feet": "foot",
    "teeth": "tooth", "oxen": "ox", "people": "person", "dice": "die", "lice": "louse", "leaves": "leaf",
    "grandchildren": "grandchild",
}  # fmt: skip
# Parts that a tokenizer of English splits from the word before them.
_ENDINGS = re.compile(r"(n't|'(?:s|re|ve|ll|d|m))$")
_TOKEN = re.compile(r"\w+(?:[-/'’]\w+)*|[^\w\s]")


def tokens(text: str) -> list[str]:
    """Words and punctuation marks of a text, case kept; "dog's" is two, "black-and-white" one."""
    found = []
    for token in _TOKEN.findall(text):
        token = token.replace("’", "'")
        ending = _ENDINGS.search(token.lower())
        if ending and ending.start():
            found += [token[: ending.start()], token[ending.start() :]]
        else:
            found.append(token)
    return found


def singular(word: str, known: AbstractSet[str]) -> str:
    """The singular of a word: itself if `known`, else the first known of its possible singulars, else a guess.

    Looking at the known words first spares rules for "bus", "scissors" and "skis".
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
    # "taxis" and "zebus" are plurals where "taxi" and "zebu" are known; of others with these endings few are.
    if word.endswith("s") and len(word) > 2 and (word[:-1] in known or not re.search(r"(ss|us|is)$", word)):
        candidates.append(word[:-1])
    return next((candidate for candidate in candidates if candidate in known), (candidates or [word])[0])


@dataclasses.dataclass(frozen=True)
class Lexicon:
    """Which words name which categories.

    Attributes:
        categories: word, or pair of words, -> category.
        double_words: pair of words -> the word it is treated as.
        origin: where the list comes from, for the record.
    """

    categories: Mapping[str, str]
    double_words: Mapping[str, str]
    origin: str

    def __post_init__(self):
        parts = {part for entry in (*self.categories, *self.double_words) for part in entry.split()}
        object.__setattr__(self, "_known", frozenset(parts | set(self.categories)))

    def words(self, text: str) -> list[str]:
        """Singular words of a text in lower case, with pairs joined; punctuation marks included."""
        single = [singular(token, self._known) for token in tokens(text.lower())]
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

    def mentions(self, words: Iterable[str]) -> list[tuple[str, str]]:
        """(word, category) of every object named, in order, repeats kept; `words` as `self.words` gives them."""
        words = list(words)
        if "toilet" in words and "seat" in words:
            words = [word for word in words if word != "seat"]
        return [(word, self.categories[word]) for word in words if word in self.categories]


def parse_synonyms(text: str, repair: bool, origin: str) -> Lexicon:
    """The lexicon of a synonym list: one category a line, words separated by a comma and a blank.

    Args:
        repair: mend blanks and capitals, and treat pairs of words as one word even where CHAIR's own list of pairs
          lacks them.

    Raises:
        LVLMError: a word stands for two categories, or there are none.
    """
    categories: dict[str, str] = {}
    double_words = dict(DOUBLE_WORDS)
    for number, line in enumerate(text.splitlines(), start=1):
        entries = [word.strip().lower() for word in line.split(",")] if repair else line.strip().split(", ")
        entries = [word for word in entries if word]
        for word in entries:
            known = categories.setdefault(word, entries[0])
            if known != entries[0]:
                raise LVLMError(
                    f"line {number} of the synonym list gives {word!r} to {entries[0]!r}, an earlier one to {known!r}; "
                    "a word stands for one category"
                )
            if repair and word.count(" ") == 1:
                double_words.setdefault(word, word)
    if not categories:
        raise LVLMError("the synonym list names no category; expected one a line, words separated by commas")
    return Lexicon(categories, double_words, origin)


def plain_lexicon(categories: Iterable[str]) -> Lexicon:
    """Category names alone, where the user gives no synonym list; names of two words count as pairs."""
    categories = list(categories)
    pairs = {name: name for name in categories if name.count(" ") == 1}
    return Lexicon({name: name for name in categories}, DOUBLE_WORDS | pairs, "category names, no synonyms")
