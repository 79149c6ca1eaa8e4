"""Stop strings and streamed pieces, character by character."""

import random

import pytest

from lvlm_jax.processors.text import StreamWriter, first_stop, tokens_before


@pytest.mark.parametrize(
    ("text", "strings", "place"),
    [
        ("a cat sat", ("cat",), 2),
        ("a cat sat", ("dog",), None),
        ("a cat sat", (), None),
        ("a cat, a cat", ("cat", "a"), 0),
        ("abcd", ("abcd", "c"), 2),  # "c" is complete before "abcd" is
        ("abcd", ("bc", "abc"), 0),  # complete together: the longer one
    ],
)
def test_the_stop_string_that_is_complete_first(text, strings, place):
    assert first_stop(text, strings) == place


def streamed(text, strings):
    """Pieces of a text that grows by one character, until a stop string is complete."""
    writer, pieces = StreamWriter(strings), []
    for end in range(1, len(text) + 1):
        cut = first_stop(text[:end], strings)
        final = cut is not None or end == len(text)
        pieces.append(writer.push(text[: end if cut is None else cut], final=final))
        if final:
            return pieces


@pytest.mark.parametrize("strings", [(), ("ab",), ("aab", "ba"), ("abab", "c"), ("aaaa",), ("abc", "bb", "�a")])
def test_pieces_make_up_the_text_before_the_stop(strings):
    """Many texts over few letters, so that stop strings begin, break off and overlap everywhere."""
    generator = random.Random(0)
    for _ in range(300):
        text = "".join(generator.choices("abc�", k=generator.randint(1, 12)))
        cut = first_stop(text, strings)
        assert "".join(streamed(text, strings)) == text[:cut]


def test_only_what_may_still_change_is_held_back():
    writer = StreamWriter(("stop",))
    assert writer.push("let us s", final=False) == "let us "
    assert writer.push("let us sto", final=False) == ""
    assert writer.push("let us stow", final=False) == "stow"
    assert writer.push("let us stow �", final=False) == " "
    assert writer.push("let us stow é", final=False) == "é"
    assert writer.push("let us stow és", final=True) == "s"


def test_the_tokens_before_a_place_are_found_in_few_readings():
    generator, readings = random.Random(1), 0

    def read(_, tokens):
        nonlocal readings
        readings += 1
        return b"".join(tokens).decode(errors="replace").strip()

    for _ in range(200):
        text = "".join(generator.choices("ab é中😀", k=generator.randint(0, 40)))
        tokens = [bytes([byte]) for byte in text.encode()]
        cut = generator.randint(0, len(text))
        lengths = [len(read(None, tokens[:count])) for count in range(len(tokens) + 1)]
        want = next((count for count, length in enumerate(lengths) if length >= cut), len(tokens))
        assert tokens_before(None, tokens, cut, read) == want
    readings = 0
    assert tokens_before(None, [b"a"] * 4096, 3000, read) == 3000 and readings < 30
