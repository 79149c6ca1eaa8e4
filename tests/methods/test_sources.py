"""What every method says of its source: in its file, in the help of the command line, in the table of the docs."""

import re
import sys
from pathlib import Path

import pytest

from lvlm_jax import methods
from lvlm_jax.methods.parse import methods_help

TABLE = Path(__file__).parents[2] / "docs" / "methods.md"
# Methods with formulas that are neither the paper's nor the authors', and the word that must say so.
OF_OTHERS = {"clva": "reconstruction", "farsight": "port", "m3id": "port"}
WORDS = re.compile(r"\b(reconstruction|port)\b")


def places(name):
    """The first line of the method's file, its line of the help, and its row of the table."""
    first = sys.modules[methods.get(name).__module__].__doc__.splitlines()[0]
    summary = next(line for line in methods_help().splitlines() if line.startswith(f"  {name}: "))
    rows = TABLE.read_text(encoding="utf-8").splitlines()
    row = next(line for line in rows if line.startswith(f"| `{name}` "))
    return first, summary, row


@pytest.mark.parametrize("name", methods.names())
def test_what_differs_from_the_source_is_said(name):
    """A paragraph begins with it, names the paper or the code, and says how it differs, or that nothing is known."""
    paragraphs = sys.modules[methods.get(name).__module__].__doc__.split("\n\n")
    (said,) = (one for one in paragraphs if one.startswith("Differs from"))
    assert re.match(r"Differs from (the paper|the authors' code|the paper and from the authors' code) in: \w", said)


@pytest.mark.parametrize("name", methods.names())
def test_ports_and_reconstructions_are_named(name):
    for place in places(name):
        assert set(WORDS.findall(place)) == {OF_OTHERS[name]} if name in OF_OTHERS else not WORDS.search(place)
