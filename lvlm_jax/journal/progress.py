"""Progress of a job: a bar on a terminal; elsewhere (a file, a pipe) a line every few seconds."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

EVERY = 10.0  # seconds between lines

T = TypeVar("T")


class Progress:
    """Counts what a job has done, and shows it on standard error.

    A line has the count, the total, the rate and the remaining time: `answers: 120 of 400, 3.4 a second, 1:22 left`. A
    job of less than `EVERY` seconds prints no line.

    Args:
        total: the number of items.
        done: number of items that were done before; they do not count for the rate.
        title: name of the items.
        quiet: whether to show nothing, because another process shows the progress.
    """

    def __init__(self, total: int, done: int = 0, title: str = "", quiet: bool = False):
        self.quiet = quiet
        self._total, self._done, self._before, self._title = total, done, done, title
        self._notes: Mapping[str, str] = {}
        self._began = self._shown = time.monotonic()
        self._printed: tuple[int, Mapping[str, str]] | None = None  # count and values of the newest line
        terminal = not quiet and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, desc=title, mininterval=1) if terminal else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """Counts `count` more items."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif not self.quiet and self._done < self._total and time.monotonic() - self._shown >= EVERY:
            self._print()

    def note(self, values: Mapping[str, str]) -> None:
        """Shows these values, such as the loss, after the count from now on."""
        self._notes = values
        if self._bar is not None:
            self._bar.set_postfix(values)

    def close(self) -> None:
        """Ends the bar, or prints a last line."""
        if self._bar is not None:
            self._bar.close()
        elif not self.quiet and self._done != self._before and time.monotonic() - self._began >= EVERY:
            if self._printed != (self._done, self._notes):
                self._print()

    def _print(self) -> None:
        time_now, new = time.monotonic(), self._done - self._before
        self._shown, self._printed = time_now, (self._done, self._notes)
        parts = [f"{self._title}: {self._done} of {self._total}"]
        if new > 0:
            each = max(time_now - self._began, 1e-9) / new
            parts.append(f"{1 / each:.1f} a second" if each <= 1 else f"{each:.1f} s each")
            if seconds_left := each * max(self._total - self._done, 0):
                parts.append(f"{_clock(seconds_left)} left")
        parts += [f"{name} {value}" for name, value in self._notes.items()]
        print(", ".join(parts), file=sys.stderr, flush=True)


def counted(things: Iterable[T], total: int, done: int = 0, title: str = "") -> Iterator[T]:
    """Yields the items, with a `Progress` that counts an item when the next one is requested."""
    with Progress(total, done, title) as progress:
        for item in things:
            yield item
            progress.update()


def say(text: str, file: TextIO | None = None) -> None:
    """Prints a line on standard error or in another file, above a progress bar if there is one."""
    tqdm.write(text, file=file or sys.stderr)


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
