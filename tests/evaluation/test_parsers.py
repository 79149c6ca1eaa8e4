"""Every parser on answers that it reads differently from the others."""

from lvlm_jax.evaluation import parsers
from tests.refusals import refused

NAMES = ("official", "opera", "lmms-eval", "strict", "first-four", "exact")
# What they make of a text: y, n, or - for neither.
TABLE = {
    "yes": "yyyyy-", "Yes": "yyyyyy", "No": "nnnnnn", " no ": "nnnnn-", "Yes.": "yy-yy-", "   yes": "yyyy--",
    "No, there is no dog.": "nn-nn-", "There is a cat. There is no dog.": "yn-n--",  # only the second sentence denies
    "There isn't a dog": "yn----",  # contractions are OPERA's alone
    "NO": "ynnnn-", "NOT": "yy--n-",  # capitals: NO is in OPERA's list, not in the official one
    "Yes and no": "nn--y-", "A dog": "yy----", "": "yy----",  # both words, or neither
    "I know nothing": "yy----", "nobody": "yy--n-",  # words inside words
    "no,there is none": "yy-nn-",  # a comma without a blank: the official rule drops it and joins the words
    "No\nthere is none": "yy-nn-", "Not really": "yy--n-", "it is not": "nn----",
}  # fmt: skip
# What VCD's makes of a text where yes is right, and where no is: it is steered by the label.
VCD = {
    "Yes": "yy", "No": "nn", "Yes and no": "yn",  # right, whatever is right
    "A dog": "ny", "I know": "nn", " YES ": "yy",  # wrong, whatever is right; a no inside a word
}  # fmt: skip
LETTERS = {
    "B": "B", "(B)": "B", "b.": "B", "B. a dog": "B", "The answer is C.": "C", "A dog and a cat: D": "D", "A. Dog": "A",
    "A is right": "A", "Answer: A": "A", "a dog": None, "Because of the dog": None, "I'd say B": "B", "": None,
    "E": None, "Both A and B": "A",  # there is no E
}  # fmt: skip


def test_yes_no():
    words = {"y": "yes", "n": "no", "-": None}
    for text, row in TABLE.items():
        for label in ("yes", "no"):  # which decides nothing
            found = [parsers.yes_no(name)(text, label) for name in NAMES]
            assert found == [words[letter] for letter in row], text
    for text, row in VCD.items():
        assert [parsers.vcd(text, "yes"), parsers.vcd(text, "no")] == [words[letter] for letter in row], text
    refused("'loose' is unknown; choose one of official, opera", parsers.yes_no, "loose")


def test_letter():
    assert {text: parsers.letter(text, tuple("ABCD")) for text in LETTERS} == LETTERS
    for text in ("I'd say B", "I think it is B"):  # contractions and words do not name the option I
        assert parsers.letter(text, tuple("ABCDEFGHI")) == "B"
