"""Methods with learned strengths (`lvlm train --config learned_method`), and the file format that stores them.

The file is safetensors: the strengths, and arrays that were fitted for a member. Its metadata name the members with
their switches, the hash of the checkpoint, the hash of the pairs, and the settings of the training. Loading a file runs
no code from it: members are methods that are already registered.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lvlm_jax import files
from lvlm_jax.attention.layered import Layered
from lvlm_jax.errors import LVLMError, library_errors
from lvlm_jax.methods import registry
from lvlm_jax.methods.base import Method, frozen
from lvlm_jax.methods.chain import Chained
from lvlm_jax.methods.fitted import Fitted, Source, load, save

FORMAT = "lvlm_jax learned 1"
WORD = "learned"  # `--method learned:FILE`


@frozen
class Learned(Chained):
    """A chain of methods with learned strengths.

    Attributes:
        source: the model and the pairs on which the strengths were learned.
    """

    source: Source | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def label(self) -> str:
        return f"learned {super().label}"


def path_of(words: str) -> Path | None:
    """The file that `learned:FILE` names; None for other words."""
    word, _, path = words.strip().partition(":")
    return Path(path) if word == WORD and path else None


def write(path: str | os.PathLike, method: Learned) -> None:
    """Writes a learned method to a file, atomically.

    Raises:
        LVLMError: the folder cannot be written to.
    """
    arrays: dict[str, np.ndarray] = {}
    members = [_described(index, member, arrays) for index, member in enumerate(method.members)]
    metadata = {"format": FORMAT, "members": json.dumps(members), **dataclasses.asdict(method.source)}
    save(path, arrays, metadata)


def read(path: str | os.PathLike) -> Learned:
    """Reads a learned method.

    Raises:
        LVLMError: the file cannot be read, is not a file of `write`, or has an unregistered member.
    """
    path = files.expand(path)
    arrays, metadata = load(path, "learned method")
    names = [field.name for field in dataclasses.fields(Source)]
    if metadata.get("format") != FORMAT or not {"members", *names} <= metadata.keys():
        raise LVLMError(f"{path} is not a learned method; make one with lvlm train --config learned_method")
    with library_errors(f"cannot read {path}"):
        described = json.loads(metadata["members"])
        members = tuple(_member(index, one, arrays) for index, one in enumerate(described))
    if not members:
        raise LVLMError(f"{path} has no members; make it again with lvlm train --config learned_method")
    return Learned(members, Source(**{name: metadata[name] for name in names}))


def name_of(member: Method) -> str:
    """The registered name of a method."""
    return next(name for name in registry.names() if registry.get(name) is type(member))


def _described(index: int, member: Method, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """A member's name and switches, as JSON values; its arrays are added to `arrays`."""
    switches, source = {}, None
    for field in dataclasses.fields(member):
        value, key = getattr(member, field.name), f"{index}.{field.name}"
        if field.metadata.get("static"):
            switches[field.name] = list(value) if isinstance(value, range) else value
        elif isinstance(value, Fitted):
            source = dataclasses.asdict(value.source)
            arrays |= {f"{key}.{name}": np.asarray(array) for name, array in value.arrays.items()}
        elif value is not None:
            value = value.values if isinstance(value, Layered) else value
            arrays[key] = np.asarray(jax.device_get(value), np.float32)
    return {"method": name_of(member), "switches": switches, "fitted": source}


def _member(index: int, described: dict[str, Any], arrays: dict[str, np.ndarray]) -> Method:
    """Rebuilds a member from the output of `_described`."""
    word, switches = described["method"], described["switches"]
    if word not in registry.names():
        raise LVLMError(f"a learned method has {word!r}, which is not registered; first import its module")
    prefix = f"{index}."
    own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    settings = {name: array[()] if not array.shape else array for name, array in own.items() if "." not in name}
    if described["fitted"]:
        inner = {name.partition(".")[2]: array for name, array in own.items() if "." in name}
        settings["fitted"] = Fitted(inner, Source(**described["fitted"]))
    return registry.get(word)(**switches, **settings)
