"""Parses answers from free text: exact copies of the yes/no parsers of published scorers, and our own.

A yes/no parser takes the text and the right answer (which only "vcd" uses) and returns "yes", "no", or None for an
answer that it cannot parse.
"""

import re
import string
from collections.abc import Callable, Sequence

from lvlm_jax.errors import LVLMError

Parser = Callable[[str, str], str | None]
LETTERS = string.ascii_uppercase  # letters of options

_YES_OR_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def official(text: str, label: str) -> str:
    """Parser of POPE and LLaVA: "No", "no" or "not" in the first sentence means no, else yes; commas are removed."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"}.intersection(words) else "yes"


def opera(text: str, label: str) -> str:
    """OPERA's parser: a negative word, or a word ending in "n't", anywhere in the text means no; else yes."""
    words = text.replace(".", "").replace(",", "").split(" ")
    negative = any(word in ("No", "not", "no", "NO") or word.endswith("n't") for word in words)
    return "no" if negative else "yes"


def vcd(text: str, label: str) -> str:
    """VCD's parser: the label if it occurs anywhere, even inside a word ("know" is a no); else the other answer."""
    if label in text.strip().lower():
        return label
    return "no" if label == "yes" else "yes"


def lmms_eval(text: str, label: str) -> str | None:
    """lmms-eval's parser: only the word itself, ignoring blanks and case ("Yes." cannot be parsed)."""
    word = text.strip().lower()
    return word if word in ("yes", "no") else None


def strict(text: str, label: str) -> str | None:
    """Our own parser: the word "yes" or "no" if the text contains just one of the two; else None."""
    words = {word.lower() for word in _YES_OR_NO.findall(text)}
    return words.pop() if len(words) == 1 else None


def first_four(text: str, label: str) -> str | None:
    """MME's parser: "yes" if the first four characters contain it, else "no" if they contain that, else None."""
    head = text.lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else None


def exact(text: str, label: str) -> str | None:
    """AMBER's parser: only the whole responses "Yes" and "No" count, with the capital letter."""
    return {"Yes": "yes", "No": "no"}.get(text)


YES_NO: dict[str, Parser] = {
    "official": official,
    "opera": opera,
    "vcd": vcd,
    "lmms-eval": lmms_eval,
    "strict": strict,
    "first-four": first_four,
    "exact": exact,
}


def yes_no(name: str) -> Parser:
    """The yes/no parser called `name`."""
    if name not in YES_NO:
        raise LVLMError(f"parser {name!r} is unknown; choose one of {', '.join(YES_NO)}")
    return YES_NO[name]


# "A dog" and "I think" contain no answer A or I, "A is right" does.
_WORD = re.compile(r"[AI]\s+(?!(?:is|because|since|as|and|or|seems|looks)\b)[a-z]")


def letter(text: str, options: Sequence[str]) -> str | None:
    """The first option letter that stands alone: "B", "(B)", "B.", "the answer is B".

    Letters are capitals, because "a" is mostly an article; a text of just one letter may be in either case. An "A" or
    "I" before a lower-case word is skipped as an English word.

    Args:
        options: the allowed letters.

    Returns:
        One of `options`; None if no letter stands alone.
    """
    alone = text.strip(" \t\r\n().:[]*\"'").upper()
    if alone in options:
        return alone
    for match in re.finditer(r"(?<![\w'])([A-Z])(?![\w'])", text):
        if match[1] in options and not _WORD.match(text, match.start()):
            return match[1]
    return None


def bare(text: str) -> str:
    """A short answer without case, article and full stop."""
    return re.sub(r"^(an?|the) |[.!]$", "", text.strip().lower())


def truncated(text: str, rule: str) -> str:
    """A caption after a truncation rule: "none", or "sentence", which keeps the text up to the last full stop.

    As in OPERA, a caption without a full stop becomes empty under "sentence".
    """
    if rule == "none":
        return text
    if rule != "sentence":
        raise LVLMError(f"truncation rule {rule!r} is unknown; choose none or sentence")
    return text[: text.rfind(".") + 1]
