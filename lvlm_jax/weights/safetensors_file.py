"""Reads and writes safetensors files through a memory map, one tensor at a time.

A file is 8 bytes (the header's length N, unsigned little-endian), N bytes of JSON (name -> dtype, shape, data_offsets)
and the tensors' bytes without gaps. The header is checked completely before any data is read. We have our own reader
because a host copy per tensor would double the peak memory, and because it can release pages that were read
(`release`), so that the peak is the model and not the file.
"""

import json
import math
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from lvlm_jax.errors import LVLMError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_AXES, _LONGEST = (32, 2**48)  # limits of an array, just below NumPy's own; no tensor comes near them
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


class SafetensorsFile:
    """An open safetensors file.

    Attributes:
        shapes: tensor name -> shape.
        dtypes: tensor name -> NumPy dtype.

    Raises:
        LVLMError: the file is missing, truncated, or not a safetensors file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_file():
            raise LVLMError(f"cannot read {self.path}: it is not a file")
        try:
            with open(self.path, "rb") as file:
                self._size = os.fstat(file.fileno()).st_size
                entries, self._start = _read_header(self.path, file, self._size)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise LVLMError(f"cannot read {self.path}: {error.strerror or error}") from error
        self._offsets = {name: entry[2] for name, entry in entries.items()}
        self.dtypes = {name: entry[0] for name, entry in entries.items()}
        self.shapes = {name: entry[1] for name, entry in entries.items()}

    def view(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the file; nothing is read until its elements are accessed."""
        begin, _ = self._offsets[name]
        shape, dtype = self.shapes[name], self.dtypes[name]
        count = math.prod(shape)
        flat = np.frombuffer(self._map, dtype, count, self._start + begin) if count else np.empty(0, dtype)
        return flat.reshape(shape)

    def release(self, name: str) -> None:
        """Returns the pages of a tensor to the system; they are read again if a view still needs them."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        begin, end = (self._start + offset for offset in self._offsets[name])
        begin -= begin % mmap.PAGESIZE
        if end > begin:
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _read_header(path: Path, file, size: int) -> tuple[dict, int]:
    """Returns {name: (dtype, shape, (begin, end))} and the offset of the data."""
    start = file.read(8)
    if start == b"version ":
        raise LVLMError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its repository")
    if size < 8:
        raise LVLMError(f"{path} is truncated: {size} bytes, too short for a safetensors file; download it again")
    length = int.from_bytes(start, "little")
    if length > _LONGEST_HEADER:
        raise LVLMError(f"{path} is not a safetensors file: its first 8 bytes give a header of {length} bytes")
    if 8 + length > size:
        raise LVLMError(f"{path} is truncated: its header takes {length} bytes, the file has {size}; download it again")
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {name: _entry(path, name, entry) for name, entry in header.items()}
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise LVLMError(f"{path} is not a safetensors file: its header is malformed ({error})") from error
    position = 0
    for name, (_, _, (begin, end)) in sorted(entries.items(), key=lambda item: item[1][2]):
        if begin != position:
            raise LVLMError(f"{path} is malformed: tensor {name} starts at byte {begin} of the data, not {position}")
        position = end
    available = size - 8 - length
    if position > available:
        raise LVLMError(
            f"{path} is truncated: its header promises {position} bytes of data, the file has {available}; "
            "download it again"
        )
    if position < available:
        raise LVLMError(f"{path} is malformed: {available - position} bytes follow the last tensor")
    return entries, 8 + length


def _entry(path: Path, name: str, entry: dict) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    if entry["dtype"] not in DTYPES:
        raise LVLMError(f"{path}: tensor {name} has the unsupported dtype {entry['dtype']}")
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"shape or data_offsets of {name}")
    if len(shape) > _MOST_AXES or math.prod(max(number, 1) for number in shape) > _LONGEST:
        raise LVLMError(f"{path} is malformed: no array can have the shape of tensor {name}, {str(shape)[:60]}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise LVLMError(
            f"{path} is malformed: tensor {name} of shape {list(shape)} and dtype {entry['dtype']} "
            f"takes {math.prod(shape) * dtype.itemsize} bytes, not {end - begin}"
        )
    return dtype, shape, (begin, end)


def write_safetensors(
    path: str | os.PathLike,
    tensors: Sequence[tuple[str, tuple[int, ...], np.dtype]],
    fetch: Callable[[str], np.ndarray],
) -> None:
    """Writes a file tensor by tensor, so that only one is on the host at a time.

    Args:
        path: the file, created or replaced.
        tensors: (name, shape, dtype) of each.
        fetch: returns a tensor's C-contiguous array by name; called once per tensor.
    """
    with open(path, "wb") as file:
        write_tensors(file, tensors, fetch)
        file.flush()
        os.fsync(file.fileno())


def write_tensors(
    file: BinaryIO, tensors: Sequence[tuple[str, tuple[int, ...], np.dtype]], fetch: Callable[[str], np.ndarray]
) -> None:
    """`write_safetensors` for an open file."""
    # Wide types first, so that every tensor is aligned to its own width.
    tensors = sorted(tensors, key=lambda tensor: (-tensor[2].itemsize, tensor[0]))
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape, dtype in tensors:
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for name, shape, dtype in tensors:
        array = fetch(name)
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{name}: announced {shape} {dtype}, given {array.shape} {array.dtype}")
        file.write(array.reshape(-1).view(np.uint8).data)
