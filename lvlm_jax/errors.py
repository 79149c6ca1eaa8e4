"""`LVLMError`, the one exception that users of this package are meant to see."""

import contextlib
import re
from collections.abc import Iterator

LONGEST = 300  # characters in a message
LONGEST_VALUE = 60  # characters in a quoted value, when the message is longer than that
QUOTED = re.compile(rf"""'[^']{{{LONGEST_VALUE},}}'|"[^"]{{{LONGEST_VALUE},}}\"""")
BREAK = re.compile(r"\s*[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]\s*")
GAP = "…"


class LVLMError(Exception):
    """The input cannot be used.

    The message is one line of at most `LONGEST` characters: what was given, what was expected, what to do. A longer
    message is shortened here. Command-line tools print it to stderr and exit with code 2. Any other exception is a bug
    in this package.
    """

    def __init__(self, message: object = ""):
        super().__init__(one_line(message))


@contextlib.contextmanager
def library_errors(what: str, advice: str = "") -> Iterator[None]:
    """Turns any exception raised inside the `with` block into an `LVLMError`: `what`, the original message, `advice`.

    This includes panics of libraries written in Rust (such as tokenizers), which do not derive from `Exception`.
    """
    try:
        yield
    except BaseException as error:
        of_library = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if isinstance(error, LVLMError) or not of_library:
            raise
        raise LVLMError(f"{what}: {str(error).strip() or type(error).__name__}{advice}") from error


def shown(value: object) -> str:
    """Formats any value for a message, on one short line."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        text = f"a very long {type(value).__name__}"
    except Exception:  # `repr` of a user's object may raise anything
        text = f"a value of type {type(value).__name__} without a text"
    return one_line(text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}{GAP}")


def one_line(message: object) -> str:
    """Puts a message on one line of at most `LONGEST` printable characters.

    Control characters are escaped. If the line is too long, long quoted values lose their middle; if it is still too
    long, the line loses its middle.
    """
    line = BREAK.sub(" ", str(message)).strip()
    if not line.isprintable():
        line = "".join(one if one.isprintable() else repr(one)[1:-1] for one in line)
    if len(line) > LONGEST:
        line = QUOTED.sub(lambda quoted: _shorten_middle(quoted[0], LONGEST_VALUE), line)
    return _shorten_middle(line, LONGEST)


def _shorten_middle(text: str, longest: int) -> str:
    """Keeps the beginning and the end of a message, which say what was given and what to do."""
    if len(text) <= longest:
        return text
    end = longest // 2 - len(GAP)
    return text[: longest - end - len(GAP)] + GAP + text[-end:]
