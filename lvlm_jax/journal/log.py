"""What runs over many questions share: a log of answers that survives a kill, and seeds that no batch changes.

A log is JSON lines. The first, `{"record": ...}`, says what is being answered by whom; a run that finds another record
there stops before it mixes answers of two. Every batch is appended and on the disk before the next begins, and a last
line that a kill has cut is dropped on the next start, so no answer is lost that a log shows and none is there twice.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lvlm_jax.errors import LVLMError
from lvlm_jax.journal.record import differences


class AnswerLog:
    """An open log, held by this process alone until it is closed.

    Attributes:
        path: the file.
        found: what `read` made of each entry that was there at the start, in the file's order.
    """

    def __init__(self, path: Path, record: Mapping[str, Any], read: Callable[[dict], Any] = dict):
        """Opens the log at `path`, or begins one with `record`.

        Args:
            record: everything that decides an answer, as JSON values.
            read: from an entry to what `found` holds; a KeyError, TypeError or ValueError of it means that the file
                is no such log.

        Raises:
            LVLMError: the file is no log, belongs to other settings or to a run under way, or cannot be written.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = path.open("ab")
        except OSError as error:
            raise LVLMError(f"{str(path)!r} cannot be written: {error.strerror}") from error
        try:
            self._hold()
            self.found = self._read(json.loads(json.dumps(record)), read)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "AnswerLog":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Lets another run have the log."""
        self._lock.close()

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Adds entries, which are on the disk when this returns. `LVLMError` when they cannot be written."""
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        try:
            with self.path.open("ab") as file:
                file.write(lines.encode("utf-8", errors="replace"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise LVLMError(f"{str(self.path)!r} cannot be written: {error.strerror}") from error

    def _hold(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LVLMError(f"{str(self.path)!r} is being written by another run; wait for it") from error
        except OSError:
            pass  # a file system without locks: nothing protects from a second run, but one run works

    def _read(self, record: dict, read: Callable[[dict], Any]) -> list:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        head = {"record": record}
        no_log = f"{str(self.path)!r} is no log of answers; give another --out, or remove it"
        # A kill may have cut the very first line; anything else without a line end is somebody else's file.
        if not whole and not (json.dumps(head, ensure_ascii=False) + "\n").encode().startswith(content):
            raise LVLMError(no_log)
        try:
            # Not splitlines: it also breaks at characters that JSON strings may hold.
            entries = [json.loads(line) for line in whole.decode("utf-8").split("\n")[:-1]]
            stored = entries[0]["record"] if entries else record
            changed = differences(stored, record)
            if len(entries) == 1 and changed:  # begun, but nothing was answered: nothing could be mixed
                whole, entries = b"", []
            elif changed:
                raise LVLMError(
                    f"{str(self.path)!r} was begun with other settings ({'; '.join(changed[:3])}); "
                    "repeat those, give another --out, or remove it to start again"
                )
            found = [read(entry) for entry in entries[1:]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LVLMError(no_log) from error
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        if not entries:
            self.append([head])
        return found


def seed_of(seed: int, name: str) -> int:
    """A seed, in [0, 2^31), that depends on the run's seed and on what is drawn, not on its place in a batch."""
    digits = np.random.SeedSequence([seed, *name.encode()]).generate_state(1)
    return int(digits[0] >> 1)
