"""Arrays that `lvlm fit` computes before a method can be used, and the file format that stores them.

A file is safetensors. Its metadata name the method, the hash of the checkpoint, the hash of the pairs, and the settings
of the fit.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from lvlm_jax import files
from lvlm_jax.errors import LVLMError, library_errors

FORMAT = "lvlm_jax fitted 1"


@dataclasses.dataclass(frozen=True)
class Source:
    """The origin of fitted arrays; static.

    Attributes:
        method: the registered name of the method.
        model: the hash of the checkpoint (`journal.record.checkpoint_hash`), and of its adapter.
        pairs: SHA-256 of the file of pairs.
        settings: the settings of the fit, as JSON.
    """

    method: str
    model: str
    pairs: str
    settings: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fitted:
    """Fitted arrays by name, and their origin."""

    arrays: dict[str, jax.Array]
    source: Source = dataclasses.field(metadata={"static": True})

    def __getitem__(self, name: str) -> jax.Array:
        return self.arrays[name]

    def record(self) -> dict[str, str]:
        """The entry for the record of a run."""
        return dataclasses.asdict(self.source)


def read(path: str | os.PathLike) -> Fitted:
    """Reads a file of `lvlm fit`.

    Raises:
        LVLMError: the file cannot be read, or `lvlm fit` did not write it.
    """
    path = files.expand(path)
    arrays, metadata = load(path, "file of lvlm fit")
    names = [field.name for field in dataclasses.fields(Source)]
    if metadata.get("format") != FORMAT or not set(names) <= metadata.keys():
        raise LVLMError(
            f"{path} is not a file of lvlm fit; make it with lvlm fit METHOD --pairs FILE --out {path.name}"
        )
    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    return Fitted(arrays, Source(**{name: metadata[name] for name in names}))


def write(path: str | os.PathLike, fitted: Fitted) -> None:
    """Writes fitted arrays to a file, atomically.

    Raises:
        LVLMError: the folder cannot be written to.
    """
    arrays = {name: jax.device_get(array) for name, array in fitted.arrays.items()}
    save(path, arrays, {"format": FORMAT, **fitted.record()})


def load(path: Path, kind: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads the arrays and the metadata of a safetensors file.

    Args:
        path: the file.
        kind: the expected kind of file, for messages.

    Raises:
        LVLMError: the file cannot be read.
    """
    content = files.read_bytes(path, kind)
    with library_errors(f"cannot read {path}"):
        arrays = safetensors.numpy.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return arrays, header.get("__metadata__") or {}


def save(path: str | os.PathLike, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a safetensors file atomically.

    Raises:
        LVLMError: the folder cannot be written to.
    """
    content = safetensors.numpy.save(arrays, metadata)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_file(Path(path)) as file:
            file.write(content)
    except OSError as error:
        raise LVLMError(f"cannot write {path}: {error.strerror or error}") from error


def as_fitted(owner: str, word: str, value: Any) -> Fitted | None:
    """Converts the value of a field for fitted arrays: a file name, `Fitted`, or None.

    Args:
        owner: the class, for messages.
        word: the method's name on the command line.

    Raises:
        LVLMError: another type, or a file of another method.
    """
    if isinstance(value, str | os.PathLike):
        value = read(value)
    if value is None:
        return None
    if not isinstance(value, Fitted):
        raise LVLMError(f"{owner}: fitted is a {type(value).__name__}; expected a file of lvlm fit {word}, or None")
    if value.source.method != word:
        raise LVLMError(f"{owner}: the file was fitted for {value.source.method}; expected one of lvlm fit {word}")
    return value


def sources(method: Any) -> Iterator[Source]:
    """The sources of everything that was fitted or learned for a method and its members."""
    if getattr(method, "source", None) is not None:
        yield method.source
    for member in getattr(method, "members", (method,)):
        for field in dataclasses.fields(member) if member is not None else ():
            if field.metadata.get("fitted") and getattr(member, field.name) is not None:
                yield getattr(member, field.name).source


def check_model(source: Source, model: str | None, name: str) -> None:
    """Raises an `LVLMError` if `source` belongs to another model.

    Args:
        source: the origin of what was fitted or learned.
        model: the hash of the model in use; None if it does not come from a folder.
        name: the model's name, for messages.
    """
    if source.model != model:
        advice = f"fit it again with lvlm fit {source.method} --model {name}"
        if source.method == "learned":
            advice = "learn it again with lvlm train --config learned_method"
        reason = "was not read from a folder, so its hash is not known" if model is None else f"has {model[:12]}…"
        fitted_for = f"{source.method} was fitted for the checkpoint {source.model[:12]}…"
        raise LVLMError(f"{fitted_for} and {name} {reason}; {advice}")


def settings_text(settings: dict[str, Any]) -> str:
    """The settings of a fit as `Source` stores them."""
    return json.dumps(settings, sort_keys=True)
