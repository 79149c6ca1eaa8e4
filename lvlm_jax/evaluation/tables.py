"""Reads rows of table files: VLMEvalKit's TSV, Hugging Face parquet folders, JSON lines."""

import ast
import base64
import binascii
import csv
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from lvlm_jax import files
from lvlm_jax.errors import LVLMError

ENDINGS = (".tsv", ".parquet", ".jsonl", ".json")
# Beginnings of base64-encoded PNG, JPEG, GIF and WebP images.
_ENCODED = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
_PLACEHOLDER = re.compile(r"<(?:image|img)[ _]?(\d*)>")
_CELL_LIMIT = threading.Lock()  # the csv module has one limit for all threads


def rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(number from 1, row) of a table file; its ending gives the format. Cells of a TSV are strings; empty cells are
    left out.

    Raises:
        LVLMError: the file is malformed, has another ending, or is parquet and pyarrow is not installed.
    """
    if path.suffix == ".tsv":
        yield from _tsv(path)
    elif path.suffix == ".parquet":
        yield from _parquet(path)
    elif path.suffix in (".jsonl", ".json"):
        yield from files.read_rows(path, "question file")
    else:
        raise LVLMError(f"question file {str(path)!r} has another ending than {', '.join(ENDINGS)}")


def _tsv(path: Path) -> Iterator[tuple[int, dict]]:
    files.existing_file(path, "question file")
    with _CELL_LIMIT, open(path, encoding="utf-8-sig", newline="") as file:
        before = csv.field_size_limit(2**31 - 1)  # cells may be images
        try:
            reader = csv.DictReader(file, delimiter="\t")
            rows = list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise LVLMError(f"question file {str(path)!r} is not a table with tabs: {error}") from error
        finally:
            csv.field_size_limit(before)
    if not rows:
        raise LVLMError(f"question file {str(path)!r} is empty; expected a heading and at least one row")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise LVLMError(f"row {number} of question file {str(path)!r} does not have the heading's cells")
        yield number, {name: cell for name, cell in row.items() if cell != ""}


def _parquet(path: Path) -> Iterator[tuple[int, dict]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise LVLMError(
            f"question file {str(path)!r} is parquet, which needs the package pyarrow; install it, or give a TSV or "
            "JSON-lines file"
        ) from error
    try:
        table = parquet.read_table(path)
    except (ArrowInvalid, OSError) as error:
        raise LVLMError(f"question file {str(path)!r} cannot be read as parquet: {error}") from error
    if not table.num_rows:
        raise LVLMError(f"question file {str(path)!r} is empty")
    try:
        rows = table.to_pylist()
    except (ArrowInvalid, ValueError) as error:  # text that is not UTF-8 too
        raise LVLMError(f"question file {str(path)!r} cannot be read as parquet: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield number, {name: cell for name, cell in row.items() if cell is not None}


def as_list(value, where: str) -> list:
    """A list from a list, from the text of a list (JSON or Python), or from a single value."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        for parse in (json.loads, ast.literal_eval):
            try:
                value = parse(value)
                break
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
        else:
            raise LVLMError(f"{where} begins like a list but is not a list: {value[:40]!r}")
    return list(value) if isinstance(value, (list, tuple)) else [value]


def picture(value, where: str) -> Path | bytes:
    """The image in a cell: `{bytes, path}` of Hugging Face, base64 of VLMEvalKit, bytes, or a file name."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value:
        raise LVLMError(f"{where} is {str(value)[:40]!r}; expected a file name or an encoded picture")
    if len(value) > 256 or value.startswith(_ENCODED):
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise LVLMError(f"{where} is neither a file name nor base64 ({error})") from error
    return Path(value)


def interleave(text: str, images: tuple, where: str) -> tuple[str, tuple]:
    """Normalises placeholders (`<image>`, `<image 2>`, `<img1>`) to `<image>`, with the images in their order.

    Images without a placeholder come first. Raises `LVLMError` if a placeholder has no image.
    """
    places = list(_PLACEHOLDER.finditer(text))
    if not places:
        return text, images
    order = []
    for place in places:
        waiting = [i for i in range(len(images)) if i not in order]
        index = int(place[1]) - 1 if place[1] else (waiting[0] if waiting else len(images))
        if not 0 <= index < len(images):
            raise LVLMError(f"{where} has the placeholder {place[0]!r} but {len(images)} images")
        order.append(index)
    unused = [i for i in range(len(images)) if i not in order]
    text = "<image>" * len(unused) + _PLACEHOLDER.sub("<image>", text)
    return text, tuple(images[i] for i in [*unused, *order])
