"""The log that survives a kill, of everything that answers many questions: jobs, benchmarks, pairs, corrections.

A log is JSON lines, one for each answer. Its record holds everything that decides an answer, and a run with another
record stops before it mixes answers of two runs. The record is the first line, `{"record": ...}`, or a file of its own
beside the log.

Every append is on the disk before the next begins. A last line that a kill has cut is dropped on the next start, so no
answer is lost that a log shows, and none is there twice. One process at a time holds a log (`lock`).
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Container, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.journal.lock import locked
from lvlm_jax.journal.record import differences

# From an entry to the key of what it answers and what is to be kept of it; None for an entry that is no answer. A
# KeyError, TypeError or ValueError means that the entry is not of this kind of log.
Read = Callable[[dict], tuple[Hashable, Any] | None]

_ELSEWHERE = "write somewhere else, or remove the file to start again"


class AnswerLog:
    """An open log, held by this process alone until it is closed.

    Attributes:
        path: the file.
        answers: what was there at the start, by key, in the file's order.
    """

    def __init__(
        self,
        path: Path,
        record: Mapping[str, Any],
        read: Read,
        keys: Container | None = None,
        record_file: Path | None = None,
    ):
        """Opens the log at `path`, or begins one with `record`.

        Args:
            record: everything that decides an answer, as JSON values.
            read: what to keep of an entry.
            keys: of what is asked; None for anything.
            record_file: where the record is; None for the first line of the log.

        Raises:
            LVLMError: the file is no log, was edited, belongs to other settings or to a run under way, or cannot be
                written.
        """
        self.path = path
        self._stack = contextlib.ExitStack()
        # Through JSON once, so that both records hold the same kinds of values.
        record = json.loads(json.dumps(record))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():
                raise LVLMError(f"{str(path)!r} cannot be written: it is no regular file")
            self._stack.enter_context(locked(path))
            self._file = self._stack.enter_context(path.open("a+b", buffering=0))
            self._file.seek(0)
            content = self._file.read()
            if record_file is not None:
                _check_beside(path, content, record, record_file)
                self.answers, size = _entries(path, content, None, read, keys)
            else:
                self.answers, size = _entries(path, content, record, read, keys)
            if size < len(content):
                self._file.truncate(size)
            if record_file is None and not size:
                self.append([{"record": record}])
        except OSError as error:
            self.close()
            raise self._unwritable(error) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "AnswerLog":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Lets another run have the log."""
        self._stack.close()

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Adds entries, which are on the disk when this returns.

        Raises:
            LVLMError: they cannot be written, or the file is gone. None of them is in the log then.
        """
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        left = memoryview(lines.encode("utf-8", errors="replace"))
        size = os.fstat(self._file.fileno()).st_size
        try:
            while left:
                left = left[self._file.write(left) :]
            if lines:
                os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            raise self._unwritable(error) from error
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno())):
                return
        raise LVLMError(
            f"{str(self.path)!r} is gone: it was moved or removed while this run wrote to it; start the run again"
        )

    def _unwritable(self, error: OSError) -> LVLMError:
        return LVLMError(f"{str(self.path)!r} cannot be written: {error.strerror or error}")


def read_log(path: Path, record: Mapping[str, Any], read: Read, keys: Container | None = None) -> dict:
    """The answers of a log whose record is its first line, by key; another process may be writing it.

    Args:
        record, read, keys: as of `AnswerLog`.

    Raises:
        LVLMError: the file is no log, was edited, or belongs to other settings.
    """
    content = files.read_bytes(path, "log")
    return _entries(path, content, json.loads(json.dumps(record)), read, keys)[0]


def expect(row: Mapping[str, Any], kinds: Mapping[str, type | tuple]) -> None:
    """Checks fields of an entry; one that is missing, of another kind or infinite is an error as `Read` raises them."""
    for name, kind in kinds.items():
        value = row[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"its {name} is {repr(value)[:60]}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"its {name} is {value}")


def text_of(name: str) -> Read:
    """For logs of entries `{"id": ..., NAME: ...}`: the text called `name`, by the id."""

    def read(entry: dict) -> tuple[str, str]:
        expect(entry, {"id": str, name: str})
        return entry["id"], entry[name]

    return read


def _check_beside(path: Path, content: bytes, record: dict, record_file: Path) -> None:
    """Stores `record` beside a new log, or compares it with the one stored when the log was begun."""
    if not content:
        files.write_atomically(record_file, json.dumps(record, indent=1, sort_keys=True) + "\n")
        return
    if not record_file.exists():
        raise LVLMError(
            f"{str(path)!r} is not empty and lies there without {record_file.name!r}, the record of the run that wrote "
            f"it; {_ELSEWHERE}"
        )
    stored = files.read_json(record_file, "record")
    if not isinstance(stored, dict):
        raise LVLMError(
            f"record {str(record_file)!r} of {str(path)!r} is a JSON {type(stored).__name__}; expected an object; "
            f"repair it, or remove {path.name!r} to start again"
        )
    _compare(path, stored, record)


def _compare(path: Path, stored: dict, record: dict) -> None:
    if changed := differences(stored, record):
        raise LVLMError(
            f"{str(path)!r} was begun with other settings ({'; '.join(changed[:3])}); repeat those, {_ELSEWHERE}"
        )


def _entries(path: Path, content: bytes, record: dict | None, read: Read, keys: Container | None) -> tuple[dict, int]:
    """The answers of a log by key, and how many of its bytes are to be kept.

    Args:
        record: what the first line must hold; None for a log whose record is elsewhere.
    """
    rows, size = _whole_lines(path, content)
    if record is not None:
        head = rows.pop(0) if rows else None
        stored = head.get("record") if isinstance(head, dict) else None
        # A kill may have cut the very first line; any other first line is somebody else's.
        begun = (json.dumps({"record": record}, ensure_ascii=False) + "\n").encode("utf-8", errors="replace")
        if not isinstance(stored, dict) and not (head is None and begun.startswith(content)):
            raise LVLMError(f"{str(path)!r} is no log of answers; {_ELSEWHERE}")
        if not rows and (head is None or differences(stored, record)):
            return {}, 0  # begun, but nothing was answered: nothing could be mixed
        _compare(path, stored, record)
    answers: dict = {}
    for number, row in enumerate(rows, start=1 if record is None else 2):
        where = f"line {number} of {str(path)!r}"
        try:
            if not isinstance(row, dict):
                raise TypeError(f"a JSON {type(row).__name__}, not an object")
            found = read(row)
            if found is None:
                continue
            key, kept = found
            known, asked = key in answers, keys is None or key in keys
        except (KeyError, TypeError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise LVLMError(
                f"{where} is no answer that this program wrote ({reason}); repair or remove the line, {_ELSEWHERE}"
            ) from error
        if known or not asked:
            shown = " ".join(map(str, key)) if isinstance(key, tuple) else key
            what = f"answers {shown} a second time" if known else f"answers {shown}, which is not asked"
            raise LVLMError(f"{where} {what}; repair or remove the line, {_ELSEWHERE}")
        answers[key] = kept
    return answers, size


def _whole_lines(path: Path, content: bytes) -> tuple[list, int]:
    """The JSON values of a file's lines, and how many bytes they take; a last line that was cut is left out."""
    # Not splitlines: it also breaks at characters that JSON strings may hold.
    lines = content.split(b"\n")
    cut = lines.pop()
    rows, size = [], 0
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line.decode("utf-8")))
        except (ValueError, RecursionError) as error:
            if number == len(lines) and not cut:
                break
            raise LVLMError(
                f"line {number} of {str(path)!r} is not JSON ({error}); repair or remove the line, {_ELSEWHERE}"
            ) from error
        size += len(line) + 1
    return rows, size


def seed_of(seed: int, name: str) -> int:
    """A seed, in [0, 2^31), that depends on the run's seed and on what is drawn, not on its place in a batch."""
    digits = np.random.SeedSequence([seed, *name.encode()]).generate_state(1)
    return int(digits[0] >> 1)
