"""From a model's free text to an answer: the yes/no parsers of published scorers, each exactly, and our own.

A yes/no parser takes the text and the right answer (which only "vcd" looks at) and gives "yes", "no", or None for an
answer it does not understand.
"""

import re
import string
from collections.abc import Callable, Sequence

from lvlm_jax.errors import LVLMError

Parser = Callable[[str, str], str | None]
LETTERS = string.ascii_uppercase  # of options

_YES_OR_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def official(text: str, label: str) -> str:
    """POPE's own and LLaVA's: in the first sentence, commas dropped, a word "No", "no" or "not" is no; else yes."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"}.intersection(words) else "yes"


def opera(text: str, label: str) -> str:
    """OPERA's: in the whole text, a negative word or one that ends in "n't" is no; else yes."""
    words = text.replace(".", "").replace(",", "").split(" ")
    negative = any(word in ("No", "not", "no", "NO") or word.endswith("n't") for word in words)
    return "no" if negative else "yes"


def vcd(text: str, label: str) -> str:
    """VCD's: the label wherever it is found, be it inside a word ("know" is a no); else the other answer."""
    if label in text.strip().lower():
        return label
    return "no" if label == "yes" else "yes"


def lmms_eval(text: str, label: str) -> str | None:
    """lmms-eval's: nothing but the word itself, blanks and case aside ("Yes." is not understood)."""
    said = text.strip().lower()
    return said if said in ("yes", "no") else None


def strict(text: str, label: str) -> str | None:
    """Ours: the one of the words "yes" and "no" that the text has; with neither or both, not understood."""
    said = {word.lower() for word in _YES_OR_NO.findall(text)}
    return said.pop() if len(said) == 1 else None


def first_four(text: str, label: str) -> str | None:
    """MME's: "yes", else "no", somewhere in the first four characters."""
    head = text.lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else None


def exact(text: str, label: str) -> str | None:
    """AMBER's: the whole response is "Yes" or "No", capital letter included."""
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


# "A dog" and "I think" hold no answer A or I, "A is right" does.
_WORD = re.compile(r"[AI]\s+(?!(?:is|because|since|as|and|or|seems|looks)\b)[a-z]")


def letter(text: str, options: Sequence[str]) -> str | None:
    """The first option letter that stands alone: "B", "(B)", "B.", "the answer is B".

    Letters are capitals, for "a" is mostly an article; a text that is nothing but one letter may be in either case. An
    "A" or "I" before a word in small letters is passed over as a word of English.

    Args:
        options: the letters there are.

    Returns:
        One of `options`; None where no letter stands alone.
    """
    alone = text.strip(" \t\r\n().:[]*\"'").upper()
    if alone in options:
        return alone
    for match in re.finditer(r"(?<![\w'])([A-Z])(?![\w'])", text):
        if match[1] in options and not _WORD.match(text, match.start()):
            return match[1]
    return None


def bare(text: str) -> str:
    """A short answer without case, article, and full stop."""
    return re.sub(r"^(an?|the) |[.!]$", "", text.strip().lower())


def truncated(text: str, rule: str) -> str:
    """A caption by a truncation rule: "none", or "sentence", which keeps what ends with the last full stop.

    As in OPERA, a caption without any full stop becomes empty under "sentence".
    """
    if rule == "none":
        return text
    if rule != "sentence":
        raise LVLMError(f"truncation rule {rule!r} is unknown; choose none or sentence")
    return text[: text.rfind(".") + 1]
