"""The objectives of training, by their name in a config's field `recipe`.

Every file of `objectives/` defines one `OBJECTIVE`, an `Objective` with the file's name. A file is imported when its
name is looked up. Other packages add theirs with `register`: an `Objective`, or a `Recipe` if the run is not
fine-tuning.
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flax import linen as nn
from ml_collections import ConfigDict

from lvlm_jax.errors import LVLMError
from lvlm_jax.lvlm import LVLM
from lvlm_jax.training import objectives
from lvlm_jax.training.loop import Task


class Check(NamedTuple):
    """The allowed values of one field of a config.

    Attributes:
        field: name of the field; in the checks of an objective, its name within the objective's section.
        expected: the accepted values, in words.
        holds: whether a value is accepted.
    """

    field: str
    expected: str
    holds: Callable[[Any], bool]


def one_of(field: str, choices: tuple[str, ...]) -> Check:
    """The check of a field that must be one of a few words."""
    return Check(field, f"one of {', '.join(choices)}", lambda value: value in choices)


@dataclasses.dataclass(frozen=True)
class Objective:
    """An objective of fine-tuning, and the fields of its config.

    Attributes:
        name: the word in `recipe`.
        task: (model, module, config, workdir) -> the task. The arguments are the base model, its module for training,
            the run's checked configuration, and the run's folder. Raises `LVLMError` for data that cannot be used.
        section: the section of the config with the objective's own fields; "" if it has none.
        defaults: these fields with their defaults.
        docs: the meaning of each of these fields, for `lvlm train --help`.
        checks: checks of single fields.
        check: refuses combinations of fields with an `LVLMError`; its argument is the whole config.
        with_base: (trainable, frozen) -> frozen, for an objective that needs the untrained model too. Called in full
            fine-tuning and if training continues from an adapter: the frozen part does not contain that model then.
        shared: the objective's own defaults for fields that all objectives have.
        divide: (model, config) -> (trainable, frozen), if the trainable parameters are not the model's.
        export: (trained, model, config, workdir) -> the path of the result, if it is not a checkpoint.
        method: config -> the method whose attention the model learns under; None if there is none.
    """

    name: str
    task: Callable[[LVLM, nn.Module, ConfigDict, Path], Task]
    section: str = ""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    docs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    check: Callable[[ConfigDict], None] | None = None
    with_base: Callable[[Any, Any], Any] | None = None
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    divide: Callable[[LVLM, ConfigDict], tuple[Any, Any]] | None = None
    export: Callable[[Any, LVLM, ConfigDict, Path], Path] | None = None
    method: Callable[[ConfigDict], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training run with its own, complete configuration.

    Attributes:
        name: the word in `recipe`.
        train: (config, workdir) -> the folder of the checkpoint.
    """

    name: str
    train: Callable[[ConfigDict, Path], Path]


_registered: dict[str, Objective | Recipe] = {}


def register(entry: Objective | Recipe) -> None:
    """Registers an objective or a recipe of another package.

    Raises:
        LVLMError: the name is taken.
    """
    if entry.name in _own() or _registered.get(entry.name, entry) != entry:
        raise LVLMError(f"the recipe name {entry.name!r} is taken; give the new one another name")
    _registered[entry.name] = entry


def names() -> tuple[str, ...]:
    """The names that `find` accepts, in alphabetical order."""
    return tuple(sorted((*_own(), *_registered)))


def find(name: str) -> Objective | Recipe:
    """Returns the objective or recipe with a name.

    Raises:
        LVLMError: no objective or recipe has this name.
    """
    if name in _registered:
        return _registered[name]
    if name not in _own():
        raise LVLMError(f"recipe {name!r} is unknown; expected one of {', '.join(names())}")
    return importlib.import_module(f"{objectives.__name__}.{name}").OBJECTIVE


def all_objectives() -> tuple[Objective, ...]:
    """All objectives, in the order of their names."""
    return tuple(entry for entry in map(find, names()) if isinstance(entry, Objective))


@functools.cache
def _own() -> frozenset[str]:
    return frozenset(module.name for module in pkgutil.iter_modules(objectives.__path__))
