"""How far a job is: a bar on a terminal, and elsewhere (a file, a pipe) a line every so often."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

EVERY = 10.0  # seconds from one line to the next

T = TypeVar("T")


class Progress:
    """Counts what a job has done, and shows it on standard error.

    A line has the count, the total, the rate and the time left: `answers: 120 of 400, 3.4 a second, 1:22 left`. A job
    of less than `EVERY` seconds prints none.

    Args:
        total: how many there are.
        done: how many were there before; they do not count for the rate.
        title: what is counted.
        quiet: shows nothing, for processes beside the one that shows it.
    """

    def __init__(self, total: int, done: int = 0, title: str = "", quiet: bool = False):
        self.quiet = quiet
        self._total, self._done, self._before, self._title = total, done, done, title
        self._notes: Mapping[str, str] = {}
        self._began = self._shown = time.monotonic()
        self._lines = 0
        terminal = not quiet and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, desc=title, mininterval=1) if terminal else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif not self.quiet and time.monotonic() - self._shown >= EVERY:
            self._print()

    def note(self, values: Mapping[str, str]) -> None:
        """Shows these values, such as the loss, behind the count from now on."""
        self._notes = values
        if self._bar is not None:
            self._bar.set_postfix(values)

    def close(self) -> None:
        """Ends the bar, or says in a last line what came of the lines before."""
        if self._bar is not None:
            self._bar.close()
        elif self._lines and self._done != self._before:
            self._print()
        self._lines = 0

    def _print(self) -> None:
        now, new = time.monotonic(), self._done - self._before
        self._shown, self._lines = now, self._lines + 1
        parts = [f"{self._title}: {self._done} of {self._total}"]
        if new > 0:
            each = max(now - self._began, 1e-9) / new
            parts.append(f"{1 / each:.1f} a second" if each <= 1 else f"{each:.1f} s each")
            if left := each * max(self._total - self._done, 0):
                parts.append(f"{_clock(left)} left")
        parts += [f"{name} {value}" for name, value in self._notes.items()]
        print(", ".join(parts), file=sys.stderr, flush=True)


def counted(things: Iterable[T], total: int, done: int = 0, title: str = "") -> Iterator[T]:
    """The things, one after the other, with a `Progress` that counts each when the next one is asked for."""
    with Progress(total, done, title) as progress:
        for thing in things:
            yield thing
            progress.update()


def say(text: str, file: TextIO | None = None) -> None:
    """A line on standard error or in another file, above a bar that may stand there."""
    tqdm.write(text, file=file or sys.stderr)


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
