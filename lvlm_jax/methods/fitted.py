"""What a method needs measured first (`lvlm fit`), and the one kind of file that it lies in.

A file is safetensors. Its metadata say whose it is: the method, the hash of the checkpoint, the hash of the pairs, the
settings of the fit.
"""

import dataclasses
import json
import os
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
    """Where fitted arrays come from; static.

    Attributes:
        method: the word of the method.
        model: the hash of the checkpoint (`journal.record.checkpoint_hash`), of an adapter too if there was one.
        pairs: SHA-256 of the file of pairs.
        settings: of the fit, as JSON.
    """

    method: str
    model: str
    pairs: str
    settings: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fitted:
    """Arrays by name, and where they come from."""

    arrays: dict[str, jax.Array]
    source: Source = dataclasses.field(metadata={"static": True})

    def __getitem__(self, name: str) -> jax.Array:
        return self.arrays[name]

    def record(self) -> dict[str, str]:
        """What the record of a run says of it."""
        return dataclasses.asdict(self.source)


def read(path: str | os.PathLike) -> Fitted:
    """The arrays of a file.

    Raises:
        LVLMError: it cannot be read, or `lvlm fit` did not write it.
    """
    path = files.expand(path)
    arrays, metadata = load(path, "file of lvlm fit")
    names = [field.name for field in dataclasses.fields(Source)]
    if metadata.get("format") != FORMAT or not set(names) <= metadata.keys():
        raise LVLMError(f"{path} is no file of lvlm fit; make one with lvlm fit METHOD --pairs FILE --out {path.name}")
    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    return Fitted(arrays, Source(**{name: metadata[name] for name in names}))


def write(path: str | os.PathLike, fitted: Fitted) -> None:
    """Writes a file in one step.

    Raises:
        LVLMError: the folder cannot be written.
    """
    arrays = {name: jax.device_get(array) for name, array in fitted.arrays.items()}
    save(path, arrays, {"format": FORMAT, **fitted.record()})


def load(path: Path, kind: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the metadata of a safetensors file.

    Raises:
        LVLMError: it cannot be read; `kind` says in the message what it should be.
    """
    content = files.read_bytes(path, kind)
    with library_errors(f"cannot read {path}"):
        arrays = safetensors.numpy.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return arrays, header.get("__metadata__", {})


def save(path: str | os.PathLike, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a safetensors file in one step.

    Raises:
        LVLMError: the folder cannot be written.
    """
    content = safetensors.numpy.save(arrays, metadata)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_file(Path(path)) as file:
            file.write(content)
    except OSError as error:
        raise LVLMError(f"cannot write {path}: {error.strerror or error}") from error


def as_fitted(owner: str, word: str, value: Any) -> Fitted | None:
    """The value of a field for fitted arrays: a file's name, its content, or None.

    Args:
        owner: the class, for messages.
        word: the method's name on the command line.

    Raises:
        LVLMError: another kind of value, or a file of another method.
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


def check_model(source: Source, model: str | None, name: str) -> None:
    """Refuses what was fitted for another model.

    Args:
        model: the hash of the model in use; None if it was not read from a folder.

    Raises:
        LVLMError: the hashes differ.
    """
    if source.model != model:
        anew = f"fit it anew with lvlm fit {source.method} --model {name}"
        if source.method == "learned":
            anew = "learn it anew with lvlm train --config learned_method"
        told = "was not read from a folder, so its hash is not known" if model is None else f"has {model[:12]}…"
        raise LVLMError(f"{source.method} was fitted for the checkpoint {source.model[:12]}… and {name} {told}; {anew}")


def settings_text(settings: dict[str, Any]) -> str:
    """Settings of a fit as `Source` keeps them."""
    return json.dumps(settings, sort_keys=True)
