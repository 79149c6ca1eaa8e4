"""Reads and writes files; errors name the file and the line, and say what was expected."""

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

LARGEST = 4 << 30  # bytes of a file that is read at once; parsed JSON takes several times as much memory
_TIDY: set[Path] = set()  # folders that this process has already cleared of files left by killed processes


def read_bytes(path: Path, what: str) -> bytes:
    """Reads a whole file.

    Raises:
        LVLMError: the file is not regular (reading a pipe could block for ever), is too large, or is unreadable.
    """
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
    """Reads a text file. Raises `LVLMError` if it is unreadable, empty, or not UTF-8."""
    content = read_bytes(path, what)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LVLMError(f"{what} {str(path)!r} is not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise LVLMError(f"{what} {str(path)!r} is empty")
    return text


def read_json(path: Path, what: str, kind: type = object) -> Any:
    """Reads a JSON file.

    Args:
        path: the file.
        what: the file's purpose, for errors; for example "annotations".
        kind: the expected type, `dict` or `list`; `object` allows every type.

    Raises:
        LVLMError: the file is unreadable, is not JSON, or contains another type.
    """
    try:
        value = json.loads(read_text(path, what))
    except (ValueError, RecursionError) as error:
        raise LVLMError(f"{what} {str(path)!r} is not JSON: {error}") from error
    if not isinstance(value, kind):
        raise LVLMError(f"{what} {str(path)!r} holds a JSON {type(value).__name__}; expected {_kinds(kind)}")
    return value


def read_rows(path: Path, what: str) -> list[tuple[int, dict]]:
    """Reads the objects of a JSON-lines file or of one JSON list, with numbers from 1; empty lines count."""
    text = read_text(path, what)
    if text.lstrip().startswith("["):
        rows = list(enumerate(read_json(path, what), start=1))
    else:
        rows = []
        # Not splitlines: it also splits at characters that JSON strings may contain.
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
    """Returns the value of the first of `names` that is in `row`.

    Raises:
        LVLMError: `row` has none of the names, or the value has another type; the message begins with `where`.
    """
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


def unique(keys: set, key, where: str) -> None:
    """Adds `key` to `keys`. Raises `LVLMError` if `keys` has it already."""
    if key in keys:
        text = key if isinstance(key, (str, int)) else " ".join(map(str, key))
        raise LVLMError(f"{where}: id {text} occurs twice; every id must occur once")
    keys.add(key)


def is_file(path: Path) -> bool:
    """Whether a path is a regular file; False for a string that cannot be a file name."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, a null byte, or a lone surrogate
        return False


def exists(path: Path) -> bool:
    """Whether a path exists; False for a string that cannot be a file name."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def open_file(path: Path, what: str = "file") -> Iterator[BinaryIO]:
    """Opens a file for reading. Raises `LVLMError` if it is unreadable or not a regular file (a pipe could block for
    ever)."""
    if exists(path) and not path.is_file():
        raise LVLMError(f"{what} {str(path)!r} is not a file; check the path")
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise LVLMError(f"{what} {str(path)!r} cannot be read: {error.strerror or error}") from error


def expand(name: str | os.PathLike) -> Path:
    """A path with ~ expanded. Raises `LVLMError` for a value that cannot be a path."""
    try:
        path = Path(os.fsdecode(os.path.expanduser(name)))
        path.exists()
    except (TypeError, ValueError, OSError) as error:  # too long, a null byte, or a lone surrogate
        reason = getattr(error, "strerror", None) or str(error)
        raise LVLMError(f"{shown(name)} is not a path ({reason}); expected the name of a file or folder") from error
    return path


def existing_file(path: Path, what: str) -> Path:
    """Returns a path that the user named, if it is an existing file. Raises `LVLMError` otherwise."""
    path = expand(path)
    if not is_file(path):
        raise LVLMError(f"{what} {str(path)!r} is not a file; check the path")
    return path


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is either complete or absent. Raises `LVLMError` if it cannot be written."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8", errors="replace"))


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a binary file for writing; it appears at `path` when it is complete, or not at all.

    Raises:
        LVLMError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent not in _TIDY:
            remove_stale(path.parent, f".{'[0-9a-f]' * 16}.part")
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
    """Creates an empty file, locked for this process; returns it with its path."""
    while True:
        # The name is random, and mode "x" follows no link, so nothing outside the folder is ever overwritten.
        part = folder / f".{secrets.token_hex(8)}.part"
        file = part.open("xb")
        if _lock_new(file.fileno(), part):
            return file, part
        file.close()


@contextlib.contextmanager
def folder_beside(path: Path, kind: str) -> Iterator[Path]:
    """Makes a private folder `.NAME.KIND-...` beside `path`, and removes it at the end unless it was moved away.

    Folders left there by killed processes are removed first. Raises `OSError` if the folder cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path.parent, f".{glob.escape(path.name)}.{kind}-*")
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.{kind}-", dir=path.parent))
        handle = os.open(folder, os.O_RDONLY) if fcntl else None
        if handle is None or _lock_new(handle, folder):
            break
        os.close(handle)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def remove_stale(folder: Path, pattern: str) -> None:
    """Removes matching files and folders that no process has locked: their writers were killed."""
    if fcntl is None:
        return
    for path in list(folder.glob(pattern)):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # opening a pipe would block
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(handle)


def _lock_new(handle: int, path: Path) -> bool:
    """Locks a file or folder that this process has just made; False if `remove_stale` of another process was faster."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks; there nothing is removed either
        return True
    return path.exists()


def sync_folder(folder: Path) -> None:
    """Flushes the file names of a folder to the disk, where the file system allows it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # the files' contents are already on the disk
            os.fsync(handle)
    finally:
        os.close(handle)
