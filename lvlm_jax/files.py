"""Reading and writing files, with one line that says which file, which line, and what was expected."""

import contextlib
import glob
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lvlm_jax.errors import LVLMError, shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LARGEST = 4 << 30  # bytes of a file that is read whole; JSON takes several times as much as objects
_TIDY: set[Path] = set()  # folders in which this process has removed what killed ones left


def read_bytes(path: Path, what: str) -> bytes:
    """The content of a file. `LVLMError` when it is no file (a pipe might wait for ever), too large, or unreadable."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise LVLMError(f"{what} {str(path)!r} is not a file; check the path")
        if size > LARGEST:
            raise LVLMError(f"{what} {str(path)!r} has {size} bytes; expected at most {LARGEST}: is it the right file?")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        reason = getattr(error, "strerror", None) or str(error)
        raise LVLMError(f"{what} {str(path)[-150:]!r} cannot be read: {reason}") from error


def read_text(path: Path, what: str) -> str:
    """The text of a file. `LVLMError` when it cannot be read, is not UTF-8, or is empty."""
    content = read_bytes(path, what)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LVLMError(f"{what} {str(path)!r} is not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise LVLMError(f"{what} {str(path)!r} is empty")
    return text


def read_json(path: Path, what: str, kind: type = object) -> Any:
    """The value of a JSON file.

    Args:
        path: the file.
        what: names it in errors, as "annotations".
        kind: what the value must be: `dict`, `list`, or anything.

    Raises:
        LVLMError: a file that cannot be read, is not JSON, or holds a value of another kind.
    """
    try:
        value = json.loads(read_text(path, what))
    except (ValueError, RecursionError) as error:
        raise LVLMError(f"{what} {str(path)!r} is not JSON: {error}") from error
    if not isinstance(value, kind):
        raise LVLMError(f"{what} {str(path)!r} holds a JSON {type(value).__name__}; expected {_kinds(kind)}")
    return value


def read_rows(path: Path, what: str) -> list[tuple[int, dict]]:
    """Objects of a JSON-lines file, or of one JSON list, each with its number (from 1; empty lines count)."""
    text = read_text(path, what)
    if text.lstrip().startswith("["):
        rows = list(enumerate(read_json(path, what), start=1))
    else:
        rows = []
        # Not splitlines: it also breaks at characters that JSON strings may hold.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    rows.append((number, json.loads(line)))
                except (ValueError, RecursionError) as error:
                    raise LVLMError(
                        f"line {number} of {what} {str(path)!r} is not JSON ({error}); repair or remove the line"
                    ) from error
    if not rows:
        raise LVLMError(f"{what} {str(path)!r} is an empty list")
    for number, row in rows:
        if not isinstance(row, dict):
            raise LVLMError(f"line {number} of {what} {str(path)!r} is a JSON {type(row).__name__}; expected an object")
    return rows


def field(row: dict, names: Sequence[str], kinds: type | tuple, where: str):
    """The first of `names` that `row` has. `LVLMError` (beginning with `where`) when it has none or another type."""
    for name in names:
        if name in row:
            value = row[name]
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise LVLMError(f"{where}: {name} is {shown(value)}; expected {_kinds(kinds)}")
            return value
    raise LVLMError(f"{where} has no {' or '.join(names)}; it has {', '.join(map(str, row)) or 'nothing'}")


def _kinds(kinds: type | tuple) -> str:
    words = {str: "a string", int: "a number", list: "a list", dict: "an object", bytes: "bytes"}
    return " or ".join(words[kind] for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))


def unique(seen: set, key, where: str) -> None:
    """Add `key` to `seen`. `LVLMError` when it is there already."""
    if key in seen:
        shown = key if isinstance(key, (str, int)) else " ".join(map(str, key))
        raise LVLMError(f"{where}: id {shown} occurs twice; every id must occur once")
    seen.add(key)


def is_file(path: Path) -> bool:
    """Whether a path is a file, whatever somebody wrote there: names that no file can have are none."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, a null byte, half a surrogate
        return False


def is_there(path: Path) -> bool:
    """Whether something has this path; names that nothing can have are none."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def reading(path: Path, what: str = "file") -> Iterator[BinaryIO]:
    """A file that is open for reading. `LVLMError` when it is none (a pipe might wait for ever), or unreadable."""
    if is_there(path) and not path.is_file():
        raise LVLMError(f"{what} {str(path)!r} is not a file; check the path")
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise LVLMError(f"{what} {str(path)!r} cannot be read: {error.strerror or error}") from error


def expanded(name: str | os.PathLike) -> Path:
    """A path that somebody wrote, with ~ replaced. `LVLMError` for what can be the name of nothing."""
    try:
        path = Path(os.fsdecode(os.path.expanduser(name)))
        path.exists()
    except (TypeError, ValueError, OSError) as error:  # too long, a null byte, half a surrogate
        reason = getattr(error, "strerror", None) or str(error)
        raise LVLMError(f"{shown(name)} is no path ({reason}); expected the name of a file or folder") from error
    return path


def given(path: Path, what: str) -> Path:
    """A path that the user named himself, as an existing file."""
    path = expanded(path)
    if not is_file(path):
        raise LVLMError(f"{what} {str(path)!r} is not a file; check the path")
    return path


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is either complete or absent. `LVLMError` when it cannot be written."""
    with whole(path) as file:
        file.write(text.encode("utf-8", errors="replace"))


@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write that appears at `path` complete or not at all. `LVLMError` when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent not in _TIDY:
            remove_left(path.parent, f".{'[0-9a-f]' * 16}.part")
            _TIDY.add(path.parent)
        file, part = _new_file(path.parent)
        with file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(part, path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        sync_folder(path.parent)
    except OSError as error:
        raise LVLMError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error


def _new_file(folder: Path) -> tuple[BinaryIO, Path]:
    """An empty file, locked for this process, and its path."""
    while True:
        # Nobody can know the name beforehand, and "x" follows no link: nothing outside the folder is ever overwritten.
        part = folder / f".{secrets.token_hex(8)}.part"
        file = part.open("xb")
        if _claimed(file.fileno(), part):
            return file, part
        file.close()


@contextlib.contextmanager
def folder_beside(path: Path, kind: str) -> Iterator[Path]:
    """A new private folder `.NAME.KIND-...` beside `path`, which is removed in the end unless it was moved away.

    Those that killed processes left there are removed first. `OSError` when it cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left(path.parent, f".{glob.escape(path.name)}.{kind}-*")
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.{kind}-", dir=path.parent))
        handle = os.open(folder, os.O_RDONLY) if fcntl else None
        if handle is None or _claimed(handle, folder):
            break
        os.close(handle)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def remove_left(folder: Path, pattern: str) -> None:
    """Removes files and folders that match and that no process holds: their writers were killed."""
    if fcntl is None:
        return
    for path in list(folder.glob(pattern)):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would wait
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(handle)


def _claimed(handle: int, path: Path) -> bool:
    """Locks what this process has just made; False when `remove_left` of another one came before."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, where nothing is removed either
        return True
    return path.exists()


def sync_folder(folder: Path) -> None:
    """Puts the names of a folder's files on the disk, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # the files themselves are on the disk
            os.fsync(handle)
    finally:
        os.close(handle)
