"""Words of a text as in published scorers: by nltk, with its data.

`lemmas` gives the words of CHAIR's scorer (OPERA's chair.py). Lower-case text is split into words, every word gets its
part of speech, and WordNet's lemmatiser reduces it to the base form of that part of speech. So verbs name objects too
("seated" is a seat, "tied" a tie), "men" stays unchanged, and "vases" becomes "vas". `nouns` gives the words of AMBER's
scorer (its inference.py): the base forms of the nouns of a text.
"""

import functools
from collections.abc import Iterable

from lvlm_jax.errors import LVLMError

# The data that the scorers read, as nltk's downloader names them, and their places in nltk's folder.
DATA = {
    "punkt_tab": "tokenizers/punkt_tab/english",
    "averaged_perceptron_tagger_eng": "taggers/averaged_perceptron_tagger_eng",
    "wordnet": "corpora/wordnet",
}
# First letters of the tagger's tags -> WordNet's letters; all other words count as nouns.
PARTS = {"J": "a", "V": "v", "R": "r"}


def require(protocol: str, instead: str) -> None:
    """Checks that nltk and its data are installed and work.

    Args:
        protocol: the protocol that needs them, for the message.
        instead: an alternative without them, for the message.

    Raises:
        LVLMError: something is missing or unreadable, or nltk is older than 3.9, which unpickles its data.
    """
    needs, otherwise = f"{protocol} reads words with nltk, as the published scorer does", f"or choose {instead}"
    try:
        import nltk

        version = nltk.__version__
    except (ImportError, AttributeError):  # a folder called nltk is a module without a version
        raise LVLMError(
            f'{needs}, and nltk is not installed; run: pip install "lvlm_jax[chair]" && {_download(DATA)}, {otherwise}'
        ) from None
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 9):
        raise LVLMError(f'{needs}, 3.9 or later, and this is {version}; run: pip install -U "nltk>=3.9", {otherwise}')
    lacks = [name for name, place in DATA.items() if not _has(nltk, place)]
    if lacks:
        raise LVLMError(f"{needs}, and its data {', '.join(lacks)} are missing; run: {_download(lacks)}, {otherwise}")
    try:
        lemmas("two dogs seated")
    except Exception as error:  # nltk may raise anything if its data are truncated or of another kind
        reason = " ".join(str(error).split())[:80]
        raise LVLMError(
            f"{needs}, and its data cannot be read ({reason}); run: {_download(DATA)}, {otherwise}"
        ) from error


def have(protocol: str) -> bool:
    """Whether nltk and its data are installed and work."""
    try:
        require(protocol, "")
    except LVLMError:
        return False
    return True


def _download(names: Iterable[str]) -> str:
    return f"python -m nltk.downloader {' '.join(names)}"


def _has(nltk, place: str) -> bool:
    """Whether nltk finds data on its own search path, unpacked or (like WordNet) in an archive."""
    for name in (place, f"{place}.zip"):
        try:
            nltk.data.find(name)
        except LookupError:
            continue
        return True
    return False


@functools.lru_cache(maxsize=4096)  # a run is scored once per control
def lemmas(text: str) -> tuple[str, ...]:
    """Words and punctuation marks of a text, in lower case and base form."""
    import nltk
    from nltk.stem import WordNetLemmatizer

    lemmatize = WordNetLemmatizer().lemmatize
    tagged = nltk.pos_tag(nltk.word_tokenize(text.lower()))
    return tuple(lemmatize(word, pos=PARTS.get(tag[:1], "n")) for word, tag in tagged)


@functools.lru_cache(maxsize=4096)
def nouns(text: str) -> tuple[str, ...]:
    """Nouns of a text in base form; capitals are kept."""
    import nltk
    from nltk.stem import WordNetLemmatizer

    lemmatize = WordNetLemmatizer().lemmatize
    return tuple(lemmatize(word) for word, tag in nltk.pos_tag(nltk.word_tokenize(text)) if tag.startswith("NN"))
