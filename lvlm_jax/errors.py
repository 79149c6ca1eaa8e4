"""The one exception that users of this package are meant to read."""

import contextlib
import re
from collections.abc import Iterator

LONGEST = 300  # characters of a message
LONGEST_VALUE = 60  # of a quoted value in a message that is longer
QUOTED = re.compile(rf"""'[^']{{{LONGEST_VALUE},}}'|"[^"]{{{LONGEST_VALUE},}}\"""")
BREAK = re.compile(r"\s*[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]\s*")
GAP = "…"


class LVLMError(Exception):
    """Something the user gave cannot be used.

    The message is one line of at most `LONGEST` characters that says what was given, what was expected, and what to
    do; a value or a library's words that would make it longer are shortened here. Command-line tools print it to
    stderr and exit with code 2; every other exception is a bug in this package.
    """

    def __init__(self, message: object = ""):
        super().__init__(one_line(message))


@contextlib.contextmanager
def explained(what: str, advice: str = "") -> Iterator[None]:
    """Makes an `LVLMError` of whatever a library raises inside: `what`, what the library says, and `advice`.

    A panic of a library that is written in Rust, such as tokenizers, is no `Exception`.
    """
    try:
        yield
    except BaseException as error:
        of_library = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if isinstance(error, LVLMError) or not of_library:
            raise
        raise LVLMError(f"{what}: {str(error).strip() or type(error).__name__}{advice}") from error


def shown(value: object) -> str:
    """A value in a message: on one line and not long, whatever it is."""
    try:
        text = repr(value)
    except ValueError:  # a number of thousands of digits has no text
        text = f"a very long {type(value).__name__}"
    except Exception:  # an object of a user's may raise anything
        text = f"a value of type {type(value).__name__} without a text"
    return one_line(text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}{GAP}")


def one_line(message: object) -> str:
    """A message as one line of at most `LONGEST` printable characters: quoted values lose their middle, then the line.

    What a terminal would obey rather than print stands there as its escape.
    """
    line = BREAK.sub(" ", str(message)).strip()
    if not line.isprintable():
        line = "".join(one if one.isprintable() else repr(one)[1:-1] for one in line)
    if len(line) > LONGEST:
        line = QUOTED.sub(lambda quoted: _without_middle(quoted[0], LONGEST_VALUE), line)
    return _without_middle(line, LONGEST)


def _without_middle(text: str, longest: int) -> str:
    """The beginning and the end, which in a message say what was given and what to do."""
    if len(text) <= longest:
        return text
    end = longest // 2 - len(GAP)
    return text[: longest - end - len(GAP)] + GAP + text[-end:]
