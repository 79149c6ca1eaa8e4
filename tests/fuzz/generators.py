"""Cases: valid files and values, damaged as bytes, in their structure, or by values of other kinds."""

import copy
import io
import json
import math
import pickle
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

Files = Mapping[str, bytes]

# A text that stands in written JSON as it is, without quotes: what a JSON writer would never write.
RAW = {
    "raw:infinite": "1e999", "raw:digits": "9" * 5000, "raw:deep": "[" * 3000 + "]" * 3000, "raw:open": "[" * 3000,
    "raw:twice": '{"a": 1, "a": 2}', "raw:nothing": "", "raw:zero": "-0",
}  # fmt: skip
TEXTS = (
    "", " ", "\n", "\t", "\x00", "\x1b[31m", "a\x00b", "\ud83d", "é", "图片", "🐕", "\u2028", "x" * 300, "x" * 5000,
    "a/b", "../x", "/", ".", "~", "-1", "0", "1", "1.5", "1e5", "nan", "inf", "true", "null", "none", "yes", "No",
    "<image>", "<image><image>", "<image 3>", "{question}", "{{ x }}", "%s", "[1", "[]", "{}", "'", '"', "a,b", "a:b",
    "a+b", "http://", "data:image/png;base64,", "file:///etc/passwd", *RAW,
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 255, 256, 1000, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**12, -(10**12), 10**40,
    10**400, 0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 1e-8, 1e-45, 1e38, 1e39, 1e300, math.nan, math.inf, -math.inf,
)  # fmt: skip
# Kinds that no file has, for calls.
OBJECTS = (
    b"", b"\xff", bytearray(b"x"), (), (1, 2), set(), {1}, range(3), range(10**12), object(), int, len, 1j,
    Decimal("1.5"), Decimal("NaN"), Fraction(1, 3), Path("a"), Path("/"), np.float32(2), np.float64("nan"),
    np.int64(3), np.bool_(True), np.array(3), np.array(2.5), np.array("x"), np.zeros(0), np.zeros(3),
    np.zeros((2, 2)), np.array([1, None]), np.datetime64("2020-01-01"), iter([1, 2]), slice(1),
)  # fmt: skip

PIECES = (b"\xff" * 4, b"\x00" * 8, b"\n", b"\xef\xbb\xbf")

texts = st.sampled_from(TEXTS) | st.text(max_size=12)
# More digits than Python prints; a strategy must have a text itself.
digits = st.just(5000).map(lambda count: 10**count)
numbers = st.sampled_from(NUMBERS) | digits | st.integers(-5, 5) | st.floats(width=32)
scalars = st.none() | st.booleans() | numbers | texts
json_values = scalars | st.sampled_from(([], {}, [[]], [{}], [None], {"": None}, ["a", 1], {"a": {"b": []}}))
json_values |= st.lists(scalars, max_size=3) | st.dictionaries(texts, scalars, max_size=3)
any_values = json_values | st.sampled_from(OBJECTS)


@st.composite
def either(draw, *strategies: st.SearchStrategy) -> Any:
    """One of some strategies, all equally likely, even if one of them is itself a choice."""
    return draw(strategies[draw(st.integers(0, len(strategies) - 1))])


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a document of dicts and lists."""
    keys: Iterable = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found = []
    for key in keys:
        found += [(value, key), *places(value[key])]
    return found


@st.composite
def changed(draw, document: Any, values=json_values, most: int = 2) -> Any:
    """A document of dicts and lists in which a few things are replaced, left out, doubled, renamed or wrapped."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(0, most))):
        there = places(document)
        if not there:
            return draw(values)
        container, key = draw(st.sampled_from(there))
        how = draw(st.sampled_from(("replace", "replace", "near", "drop", "wrap", "copy", "rename", "text")))
        if how == "replace":
            container[key] = _fresh(draw(values))
        elif how == "near":
            container[key] = draw(near(container[key]))
        elif how == "wrap":
            container[key] = draw(st.sampled_from(([container[key]], {"a": container[key]}, [[container[key]]])))
        elif how == "text":
            container[key] = printed(container[key])
        elif how == "drop":
            del container[key]
        elif how == "copy":
            other, place = draw(st.sampled_from(there))
            if isinstance(other, list) and place < len(other) or isinstance(other, dict) and place in other:
                container[key] = copy.deepcopy(other[place])
        elif isinstance(container, dict):
            container[draw(texts)] = container.pop(key)
        else:
            container.insert(key, copy.deepcopy(container[key]))
    return document


def _fresh(value: Any) -> Any:
    """A copy of a value that may be changed, because other cases share the lists and dicts of a strategy."""
    return copy.deepcopy(value) if isinstance(value, list | dict) else value


def printed(value: Any) -> str:
    """A value as text; works for integers with more digits than Python prints, too."""
    try:
        return str(value)
    except ValueError:
        return "9" * 5000


def near(value: Any) -> st.SearchStrategy:
    """Values of the same kind that differ a little."""
    if isinstance(value, bool) or value is None:
        return st.sampled_from((True, False, 0, 1, None))
    if isinstance(value, int | float) and abs(value) < 2**53:
        return st.sampled_from((-value, value + 1, value - 1, value * 1000, value + 0.5, float(value), 0, -1))
    if isinstance(value, str):
        return changed_text(value)
    if isinstance(value, list):
        return st.sampled_from((value[:1], value[1:], value * 2, value[::-1], []))
    return st.just({})


@st.composite
def changed_text(draw, text: str) -> str:
    """A text in which a piece is left out, doubled or replaced."""
    start = draw(st.integers(0, len(text)))
    end = draw(st.integers(start, min(len(text), start + 8)))
    piece = draw(st.just("") | st.just(text[start:end] * 2) | texts)
    return text[:start] + piece + text[end:]


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Bytes that are cut, overwritten, repeated, or have others put in."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(content)))
        size = draw(st.sampled_from((0, 1, 2, 4, 8, 64)))
        how = draw(st.sampled_from(("cut", "overwrite", "overwrite", "insert", "drop", "repeat")))
        piece = draw(st.binary(min_size=1, max_size=8) | st.sampled_from(PIECES))
        content = {
            "cut": content[:place],
            "overwrite": content[:place] + piece + content[place + len(piece) :],
            "insert": content[:place] + piece + content[place:],
            "drop": content[:place] + content[place + size :],
            "repeat": content[: place + size] + content[place:],
        }[how]
    return content


def written_json(value: Any, **options: Any) -> str:
    """JSON, with the texts of `RAW` as what they stand for."""
    try:
        text = json.dumps(value, **options)
    except (ValueError, RecursionError):  # more digits than Python writes
        return "9" * 5000
    return re.sub(r'"(raw:\w+)"', lambda found: RAW.get(found[1], found[0]), text)


@st.composite
def changed_json(draw, content: bytes) -> bytes:
    text = written_json(draw(changed(json.loads(content))), ensure_ascii=draw(st.booleans()))
    return text.encode("utf-8", "surrogatepass")


@st.composite
def changed_lines(draw, content: bytes) -> bytes:
    """A JSON-lines file in which objects are changed, or which is written in another way."""
    rows = draw(changed([json.loads(line) for line in content.splitlines() if line.strip()], most=3))
    rows = rows if isinstance(rows, list) else [rows]
    end = draw(st.sampled_from(("\n", "\n", "\n", "\r\n", "\n\n", " \n")))
    ascii = draw(st.booleans())
    text = "".join(written_json(row, ensure_ascii=ascii) + end for row in rows)
    if draw(st.integers(0, 9)) == 0:
        text = written_json(rows, ensure_ascii=ascii)
    return text.encode("utf-16" if draw(st.integers(0, 40)) == 0 else "utf-8", "surrogatepass")


@st.composite
def changed_table(draw, content: bytes) -> bytes:
    """A table with tabs or commas in which cells are changed."""
    text = content.decode()
    separator = "\t" if "\t" in text else ","
    cells = [line.split(separator) for line in text.splitlines()]
    cells = draw(changed(cells, texts, most=3))
    lines = [separator.join(map(str, row)) if isinstance(row, list) else str(row) for row in cells]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


@st.composite
def changed_parquet(draw, content: bytes) -> bytes:
    """A parquet file whose rows, and so whose columns' kinds, are changed."""
    import pyarrow
    from pyarrow import parquet

    rows = parquet.read_table(io.BytesIO(content)).to_pylist()
    rows = draw(changed(rows, most=2))
    file = io.BytesIO()
    try:
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    except Exception:  # rows that are no table: damage the bytes instead
        return draw(damaged(content))
    return file.getvalue()


@st.composite
def changed_pickle(draw, content: bytes) -> bytes:
    value = draw(changed(pickle.loads(content), any_values))
    try:
        return pickle.dumps(value, protocol=draw(st.integers(0, 5)))
    except Exception:  # a value that has no pickle
        return draw(damaged(content))


@st.composite
def changed_safetensors(draw, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = written_json(draw(changed(json.loads(content[8 : 8 + length])))).encode("utf-8", "surrogatepass")
    size = draw(st.sampled_from((len(header), len(header), len(header), 0, 2**40, 2**64 - 1)))
    return size.to_bytes(8, "little") + header + content[8 + length :]


@st.composite
def changed_words(draw, content: bytes) -> bytes:
    text = content.decode()
    for _ in range(draw(st.integers(0, 3))):
        text = draw(changed_text(text))
    return text.encode("utf-8", "surrogatepass")


STRUCTURES = {"json": changed_json, "jsonl": changed_lines, "parquet": changed_parquet, "pkl": changed_pickle}
STRUCTURES |= {"safetensors": changed_safetensors} | dict.fromkeys(("tsv", "csv"), changed_table)
STRUCTURES |= dict.fromkeys(("txt", "jinja", "tiktoken", "py"), changed_words)


def changed_file(name: str, content: bytes) -> st.SearchStrategy[bytes]:
    """A file that is damaged in its structure, if its suffix names a known format, or as bytes."""
    kind = name.rpartition(".")[2]
    if kind == "json" and b"}\n{" in content:  # POPE's lines end in .json
        kind = "jsonl"
    by_bytes = damaged(content) | st.sampled_from((b"", b"\n", b"\xff\xfe", b"null", b"[]", b"{}", b"\x00" * 100))
    structure = STRUCTURES.get(kind)
    if structure is None:
        return by_bytes
    return structure(content) | structure(content) | structure(content) | by_bytes


@st.composite
def changed_folder(draw, files: Files, *names: str) -> Files:
    """A folder in which one file (of `names`, or of all) is changed, missing, or replaced by a folder or a pipe."""
    name = draw(st.sampled_from(names or tuple(files)))
    how = draw(st.sampled_from(("change",) * 20 + ("missing", "folder", "pipe")))
    new = draw(changed_file(name, files[name])) if how == "change" else how
    return {**files, name: new}


def write(files: Files, folder: Path) -> None:
    """Writes the files of a case; "folder" and "pipe" in the place of content make one, "missing" makes nothing."""
    import os

    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "folder":
            path.mkdir()
        elif content == "pipe":
            os.mkfifo(path)


def read(folder: Path) -> Files:
    """The files of a folder, by their names in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
