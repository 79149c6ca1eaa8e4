"""The oracle: the allowed outcomes of a case, and the faults.

A case is refused with an `LVLMError` of one short line, or accepted, and then what was read is used. Everything else
is a fault: another exception, time beyond the limit, warnings without end, a value that is not the right one.
"""

import contextlib
import io
import logging
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis.strategies import SearchStrategy

from lvlm_jax.errors import LONGEST, LVLMError

ACCEPTED, REFUSED = "accepted", "refused"
SECONDS = 10.0  # of the processor, for one case
WAITING = 12  # times as long for a case that waits, as for a pipe, or for a processor that others use
MOST_LINES = 20  # of warnings and of what is printed to stderr


class Reader(NamedTuple):
    """Something that reads what users give it.

    Attributes:
        name: in tables.
        cases: strategy of cases.
        read: (case, empty folder) reads the case and uses what it read; raises `LVLMError`, or `Wrong`.
        share: how many cases it gets beside the others.
    """

    name: str
    cases: SearchStrategy
    read: Callable[[Any, Path], None]
    share: float = 1.0


class Wrong(AssertionError):
    """The value that was read differs from the value that was given."""


class TooLong(BaseException):
    """The time limit of a case has passed. Not an `Exception`, so that no reader catches it."""


class Fault(AssertionError):
    """A fault of a reader. `kind` is its column of the table."""

    def __init__(self, kind: str, text: str):
        super().__init__(f"{kind}: {text}")
        self.kind = kind


def same(read: Any, given: Any, what: str) -> None:
    """Raises `Wrong` if two values differ."""
    if read != given:
        raise Wrong(f"{what}: {text_of(read, 200)}, expected {text_of(given, 200)}")


def text_of(value: Any, longest: int = 1500) -> str:
    """Anything as text."""
    try:
        return repr(value)[:longest]
    except Exception:  # a number of more digits than Python prints
        return f"a {type(value).__name__} without text"


def used(*values: Any) -> None:
    """Values that a user would go on to compute."""


def attempt(reader: Reader, case: Any, folder: Path, seconds: float = SECONDS) -> str:
    """The outcome of a case: `ACCEPTED` or `REFUSED`.

    Raises:
        Fault: it does something else.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with _listening() as lines, _limited(seconds):
            reader.read(case, folder)
        outcome = ACCEPTED
    except LVLMError as error:
        _check_message(str(error))
        outcome = REFUSED
    except Fault:
        raise
    except Wrong as error:
        raise Fault("wrong", str(error)) from error
    except TooLong as error:
        raise Fault("hang", f"more than {seconds:g} s") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also an exit, and a panic of a library in Rust
        raise Fault("traceback", f"{type(error).__name__}: {str(error)[:300]}") from error
    if len(lines) > MOST_LINES:
        raise Fault("storm", f"{len(lines)} lines of warnings, first {lines[0]!r}")
    return outcome


def _check_message(message: str) -> None:
    if not message or len(message) > LONGEST or not message.isprintable():
        raise Fault("message", f"{len(message)} characters: {message[:400]!r}")


class _Lines(logging.Handler):
    """Counts what is logged."""

    def __init__(self, lines: list[str]):
        super().__init__(logging.WARNING)
        self.lines = lines

    def emit(self, record):
        self.lines.append(record.getMessage()[:200])


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
    """Collects the lines of warnings, logs and stderr while a case is read; they and stdout are not shown."""
    lines: list[str] = []
    handler, printed = _Lines(lines), _text()
    logging.getLogger().addHandler(handler)
    try:
        streams = contextlib.redirect_stderr(printed), contextlib.redirect_stdout(_text())
        with warnings.catch_warnings(record=True) as warned, streams[0], streams[1]:
            warnings.simplefilter("default")
            yield lines
    finally:
        logging.getLogger().removeHandler(handler)
        lines += [str(one.message)[:200] for one in warned]
        printed.seek(0)
        lines += printed.read().splitlines()


def _text() -> io.TextIOWrapper:
    """A stream like those of a process."""
    return io.TextIOWrapper(io.BytesIO(), "utf-8", errors="replace", write_through=True)


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises `TooLong` when this process exceeds its limit of CPU time, or a longer limit of wall time."""

    def over(*_):
        raise TooLong

    waits = WAITING * seconds  # others may be computing on this machine
    clocks = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, waits)}
    before = {number: signal.signal(number, over) for number in clocks}
    for clock, left in clocks.values():
        signal.setitimer(clock, left)
    try:
        yield
    finally:
        for clock, _ in clocks.values():
            signal.setitimer(clock, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
