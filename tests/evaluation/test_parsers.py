"""Every parser on the answers that tell it from the others."""

import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import parsers

# text, then what official, opera, lmms-eval, strict, first-four and exact make of it
TABLE = [
    ("yes", "yes", "yes", "yes", "yes", "yes", None),
    ("Yes", "yes", "yes", "yes", "yes", "yes", "yes"),
    ("No", "no", "no", "no", "no", "no", "no"),
    (" no ", "no", "no", "no", "no", "no", None),
    ("Yes.", "yes", "yes", None, "yes", "yes", None),
    ("No, there is no dog.", "no", "no", None, "no", "no", None),
    # only the second sentence denies
    ("There is a cat. There is no dog.", "yes", "no", None, "no", None, None),
    # contractions are OPERA's alone
    ("There isn't a dog", "yes", "no", None, None, None, None),
    # capitals: NO is in OPERA's list, not in the official one
    ("NO", "yes", "no", "no", "no", "no", None),
    ("NOT", "yes", "yes", None, None, "no", None),
    # both words
    ("Yes and no", "no", "no", None, None, "yes", None),
    # neither
    ("A dog", "yes", "yes", None, None, None, None),
    ("", "yes", "yes", None, None, None, None),
    # words inside words
    ("I know nothing", "yes", "yes", None, None, None, None),
    ("nobody", "yes", "yes", None, None, "no", None),
    # a comma without a blank: the official rule drops it and joins the words
    ("no,there is none", "yes", "yes", None, "no", "no", None),
    ("No\nthere is none", "yes", "yes", None, "no", "no", None),
    ("Not really", "yes", "yes", None, None, "no", None),
    ("it is not", "no", "no", None, None, None, None),
    ("   yes", "yes", "yes", "yes", "yes", None, None),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: repr(row[0]))
def test_yes_no(row):
    text, *expected = row
    names = ("official", "opera", "lmms-eval", "strict", "first-four", "exact")
    assert [parsers.yes_no(name)(text, "yes") for name in names] == expected
    assert [parsers.yes_no(name)(text, "no") for name in names] == expected  # the label decides nothing


@pytest.mark.parametrize(
    ("text", "for_yes", "for_no"),
    [
        ("Yes", "yes", "yes"),
        ("No", "no", "no"),
        ("Yes and no", "yes", "no"),  # right, whatever is right
        ("A dog", "no", "yes"),  # wrong, whatever is right
        ("I know", "no", "no"),  # a no inside a word
        (" YES ", "yes", "yes"),
    ],
)
def test_vcd_is_steered_by_the_label(text, for_yes, for_no):
    assert parsers.vcd(text, "yes") == for_yes
    assert parsers.vcd(text, "no") == for_no


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("b.", "B"),
        ("B. a dog", "B"),
        ("The answer is C.", "C"),
        ("A dog and a cat: D", "D"),
        ("A is right", "A"),
        ("A. Dog", "A"),
        ("Answer: A", "A"),
        ("a dog", None),
        ("Because of the dog", None),
        ("E", None),  # no such option
        ("I'd say B", "B"),
        ("", None),
        ("Both A and B", "A"),
    ],
)
def test_letter(text, expected):
    assert parsers.letter(text, ("A", "B", "C", "D")) == expected


def test_letter_with_many_options_is_not_fooled_by_contractions():
    assert parsers.letter("I'd say B", tuple("ABCDEFGHI")) == "B"
    assert parsers.letter("I think it is B", tuple("ABCDEFGHI")) == "B"


def test_unknown_parser():
    with pytest.raises(LVLMError, match="'loose' is unknown; choose one of official, opera"):
        parsers.yes_no("loose")
