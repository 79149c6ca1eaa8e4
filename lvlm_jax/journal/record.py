"""The record of a run: everything that determines its answers, so that runs can be compared."""

import dataclasses
import hashlib
import pathlib

import numpy as np

from lvlm_jax import files
from lvlm_jax.version import __version__

# Number of evenly spread samples of a weight file; hashing all of a 14 GB model would take half a minute.
_SAMPLES = 64
_SAMPLE_BYTES = 16 * 1024
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
# Field with a name -> field with the hash of its content: equal hashes make a moved or renamed folder the same.
_HASH_OF = {"name": "sha256", "model": "model_sha256"}


def file_hash(path) -> str:
    """SHA-256 of a whole file, in hexadecimal. Raises `LVLMError` if it is unreadable."""
    with files.open_file(pathlib.Path(path)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sampled_hash(path: pathlib.Path) -> bytes:
    """SHA-256 of a file's size, and of samples from its first byte to its last."""
    with files.open_file(path) as file:
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        for offset in np.linspace(0, max(size - _SAMPLE_BYTES, 0), _SAMPLES).astype(int):
            file.seek(offset)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()


def checkpoint_hash(folder) -> str:
    """One SHA-256 for a checkpoint folder: names and contents of its JSON and template files, and samples of its
    weights.

    The samples are the header, the size and 64 stretches of 16 KiB; training changes all of them.
    """
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(folder).iterdir()):
        if path.suffix in _WEIGHT_SUFFIXES:
            content = _sampled_hash(path)
        elif path.suffix in (".json", ".jinja", ".model", ".txt"):
            content = file_hash(path).encode()
        else:
            continue
        digest.update(path.name.encode() + b"\0" + content)
    return digest.hexdigest()


def model_hash(folder, adapter=None) -> str:
    """The hash of a checkpoint folder, combined with that of an adapter's folder."""
    own = checkpoint_hash(folder)
    return own if adapter is None else f"{own}+{checkpoint_hash(adapter)}"


def run_record(model_path, dtype: str, method, settings: dict) -> dict:
    """Everything that determines the answers of a run, as plain JSON values; a model of the hub has only its id."""
    folder = pathlib.Path(model_path)
    return {
        "version": __version__,
        "model": str(model_path),
        "model_sha256": checkpoint_hash(folder) if folder.is_dir() else None,
        "dtype": dtype,
        "image_backend": "pil",  # with torchvision, pixels would differ (`processors.load`)
        "method": method_record(method),
        "generation": settings,
    }


def adapter_record(path: str | None) -> dict:
    """The record of an adapter, which is a folder or a hub id; empty if there is no adapter."""
    if path is None:
        return {}
    folder = files.expand(path)
    return {"adapter": path, "adapter_sha256": checkpoint_hash(folder) if folder.is_dir() else None}


def method_record(method) -> dict | None:
    """A method as plain JSON values: its class name and its fields; None for no method."""
    if method is None:
        return None
    return {"name": type(method).__name__} | {
        field.name: _plain(getattr(method, field.name)) for field in dataclasses.fields(method)
    }


def _plain(value):
    if hasattr(value, "record"):  # fitted or learned arrays
        return value.record()
    if dataclasses.is_dataclass(value):
        return method_record(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.floating):
        return float(str(value))  # a float32 of 0.2 is 0.2, not 0.20000000298
    if isinstance(value, range):
        return str(value)
    if hasattr(value, "__array__"):
        return np.asarray(value).tolist()
    return value


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """The differences between two records, as `name: old, now new`, with nested names joined by dots.

    Two different names of a model or a file are no difference if their hashes are equal.
    """
    changes = []
    for key in sorted(old.keys() | new.keys()):
        digest = old.get(_HASH_OF.get(key))
        if digest is not None and digest == new.get(_HASH_OF[key]):
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            changes.append(f"{prefix}{key}: {before!r}, now {after!r}")
    return changes
