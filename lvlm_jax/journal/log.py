"""A log of answers that survives a kill: for jobs, benchmarks, pairs and corrections.

A log is JSON lines, one per answer. Its record contains everything that determines an answer; a run with another record
stops before it mixes answers of two runs. The record is the first line, `{"record": ...}`, or a separate file beside
the log.

Every append is on the disk before the next begins. A last line that was cut off by a kill is dropped on the next start,
so no logged answer is lost and none is logged twice. Only one process at a time may write a log (`lock`).
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

# Maps an entry to (key of its question, value to keep), or None for an entry that is not an answer. A KeyError,
# TypeError or ValueError means that the entry does not belong to this kind of log.
Read = Callable[[dict], tuple[Hashable, Any] | None]

_ELSEWHERE = "write to another file, or remove this one to start again"


class AnswerLog:
    """An open log; only this process can write to it until it is closed.

    Attributes:
        path: the file.
        answers: the answers in the log when it was opened, by key, in the file's order.
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
            record: everything that determines an answer, as JSON values.
            read: maps an entry to its key and the value to keep of it.
            keys: keys of the questions; None allows any.
            record_file: file of the record; None for the first line of the log.

        Raises:
            LVLMError: the file is not a log, was edited, belongs to other settings or to a running process, or cannot
                be written.
        """
        self.path = path
        self._stack = contextlib.ExitStack()
        # Through JSON once, so that both records have the same types of values.
        record = json.loads(json.dumps(record))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():
                raise LVLMError(f"{str(path)!r} cannot be written: it is not a regular file")
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
        """Releases the log."""
        self._stack.close()

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Adds entries; when the call returns, they are on the disk.

        Raises:
            LVLMError: they cannot be written, or the file is gone. Then none of them is in the log.
        """
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        remaining = memoryview(lines.encode("utf-8", errors="replace"))
        size = os.fstat(self._file.fileno()).st_size
        try:
            while remaining:
                remaining = remaining[self._file.write(remaining) :]
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
    """Reads the answers of a log with its record in the first line, by key; another process may be writing to it.

    Args:
        record, read, keys: as for `AnswerLog`.

    Raises:
        LVLMError: the file is not a log, was edited, or belongs to other settings.
    """
    content = files.read_bytes(path, "log")
    return _entries(path, content, json.loads(json.dumps(record)), read, keys)[0]


def expect(row: Mapping[str, Any], kinds: Mapping[str, type | tuple]) -> None:
    """Checks the fields of an entry; a field that is missing, infinite or has another type raises an error as in
    `Read`."""
    for name, kind in kinds.items():
        value = row[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"its {name} is {repr(value)[:60]}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"its {name} is {value}")


def text_of(name: str) -> Read:
    """For logs of entries `{"id": ..., NAME: ...}`: maps an entry to its id and the text called `name`."""

    def read(entry: dict) -> tuple[str, str]:
        expect(entry, {"id": str, name: str})
        return entry["id"], entry[name]

    return read


def _check_beside(path: Path, content: bytes, record: dict, record_file: Path) -> None:
    """Stores `record` beside a new log, or compares it with the record of an existing log."""
    if not content:
        files.write_whole(record_file, json.dumps(record, indent=1, sort_keys=True) + "\n")
        return
    if not record_file.exists():
        raise LVLMError(
            f"{str(path)!r} is not empty and has no {record_file.name!r} beside it, the record of the run that wrote "
            f"it; {_ELSEWHERE}"
        )
    stored_record = files.read_json(record_file, "record")
    if not isinstance(stored_record, dict):
        raise LVLMError(
            f"record {str(record_file)!r} of {str(path)!r} is a JSON {type(stored_record).__name__}; expected an "
            "object; "
            f"repair it, or remove {path.name!r} to start again"
        )
    _compare(path, stored_record, record)


def _compare(path: Path, stored: dict, record: dict) -> None:
    if changes := differences(stored, record):
        raise LVLMError(
            f"{str(path)!r} was begun with other settings ({'; '.join(changes[:3])}); repeat those, {_ELSEWHERE}"
        )


def _entries(path: Path, content: bytes, record: dict | None, read: Read, keys: Container | None) -> tuple[dict, int]:
    """The answers of a log by key, and how many of its bytes to keep.

    Args:
        record: the expected content of the first line; None for a log with a separate record.
    """
    rows, size = _whole_lines(path, content)
    if record is not None:
        head = rows.pop(0) if rows else None
        stored_record = head.get("record") if isinstance(head, dict) else None
        # A kill may have cut off the very first line; any other first line belongs to another program.
        begun = (json.dumps({"record": record}, ensure_ascii=False) + "\n").encode("utf-8", errors="replace")
        if not isinstance(stored_record, dict) and not (head is None and begun.startswith(content)):
            raise LVLMError(f"{str(path)!r} is not a log of answers; {_ELSEWHERE}")
        if not rows and (head is None or differences(stored_record, record)):
            return {}, 0  # begun, but without answers: nothing to mix
        _compare(path, stored_record, record)
    answers: dict = {}
    for number, row in enumerate(rows, start=1 if record is None else 2):
        line_name = f"line {number} of {str(path)!r}"
        try:
            if not isinstance(row, dict):
                raise TypeError(f"a JSON {type(row).__name__}, not an object")
            key_and_value = read(row)
            if key_and_value is None:
                continue
            key, value = key_and_value
            is_repeat, is_expected = key in answers, keys is None or key in keys
        except (KeyError, TypeError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise LVLMError(
                f"{line_name} is not an answer that this program wrote ({reason}); repair or remove the line, "
                f"{_ELSEWHERE}"
            ) from error
        if is_repeat or not is_expected:
            key_text = " ".join(map(str, key)) if isinstance(key, tuple) else key
            problem = (
                f"answers {key_text} a second time"
                if is_repeat
                else f"answers {key_text}, which is not a question of this run"
            )
            raise LVLMError(f"{line_name} {problem}; repair or remove the line, {_ELSEWHERE}")
        answers[key] = value
    return answers, size


def _whole_lines(path: Path, content: bytes) -> tuple[list, int]:
    """The JSON values of a file's lines, and how many bytes they take; an incomplete last line is left out."""
    # Not splitlines: it also splits at characters that JSON strings may contain.
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
    """A seed in [0, 2^31) that depends on the run's seed and on the name, not on the place in a batch."""
    digits = np.random.SeedSequence([seed, *name.encode()]).generate_state(1)
    return int(digits[0] >> 1)
