"""The names of methods: those of this package's files, those of other packages, and those of a user's own files.

A file in `lvlm_jax/methods/` is found by walking the folder. Another package names its methods by entry points,

    [project.entry-points."lvlm_jax.methods"]
    lift = "my_package.lift:Lift"

which are imported when a method of that name is asked for, or all names are. And wherever a name is taken,
"module:Class" and "path/file.py:Class" stand for a class of the user's own.
"""

import dataclasses
import importlib
import inspect
import os
import pkgutil
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any, dataclass_transform

from lvlm_jax import config_files
from lvlm_jax.attention.transform import ATTENTION_STAGES
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods.base import Method, data, fitted, frozen, strength, switch

GROUP = "lvlm_jax.methods"  # of entry points
NAME = re.compile(r"[a-z][a-z0-9_-]*")
WORDS = ("none", "greedy")  # stand for no method

_REGISTRY: dict[str, type[Method]] = {}
_BROKEN: set[str] = set()  # entry points that were named in a warning


@dataclass_transform(frozen_default=True, field_specifiers=(strength, switch, data, fitted))
def register(name: str | Any) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: makes a method a frozen dataclass and a pytree, and lets the command line name it.

    The same class may be registered again (a module that is reloaded or imported under two names, a cell of a
    notebook); the newer one then has the name. Things of another type (`Any`) are answered for here.

    Raises:
        LVLMError: the name or the class cannot be used; the message says what to do.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name) or name in WORDS:
        given = getattr(name, "__name__", name)
        raise LVLMError(
            f"register got {given!r}; expected a name of lower-case letters, digits, - and _, as in "
            '@methods.register("lift")'
        )

    def decorate(cls: type[Method] | Any) -> type[Method]:
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise LVLMError(f"{_full_name(cls)} is no method; write class {_short_name(cls)}(methods.Method)")
        taken = _REGISTRY.get(name)
        if taken is not None and not _same(taken, cls):
            raise LVLMError(
                f"the name {name!r} is that of {_full_name(taken)}; give {_full_name(cls)} another one in "
                "@methods.register"
            )
        source = _source(cls)
        cls = frozen(cls)
        _check_fields(cls)
        cls._source = source
        _REGISTRY[name] = cls
        return cls

    return decorate


def _check_fields(cls: type[Method]) -> None:
    """Refuses fields that the command line could not show, and fields in the place of a stage."""
    fields = dataclasses.fields(cls)
    for field in fields:
        name = f"{cls.__name__}: the field {field.name}"
        if "doc" not in field.metadata:
            raise LVLMError(
                f'{name} has no words; write {field.name} = methods.strength(default, "what it is") for a number '
                "to sweep, methods.switch for structure, methods.data for another array"
            )
        if field.name in HOOKS:
            raise LVLMError(f"{name} has the name of a stage or hook; give it another")
    edited = any(getattr(cls, stage) is not getattr(Method, stage) for stage in ATTENTION_STAGES)
    if edited and "layers" in (field.name for field in fields) and cls.active is Method.active:
        raise LVLMError(
            f"{cls.__name__}: its field layers hides the method layers(); write "
            "active(self, layer, num_layers, phase), which says where the stages run"
        )


# What a field may not be called: `layers` and `rows` it may, as long as they are what the protocol expects.
HOOKS = {name for name in dir(Method) if name[0] != "_"} - {"layers", "rows"}


def _same(old: type, new: type) -> bool:
    """Whether one class is another form of the other: the same definition, run again."""
    if old.__qualname__ != new.__qualname__:
        return False
    return old is new or old.__module__ == new.__module__ or (old._source is not None and old._source == _source(new))


def _source(cls: type) -> str | None:
    """The file of a class; None where it has none."""
    if "_source" in vars(cls):
        return cls._source
    code = next((member.__code__ for member in vars(cls).values() if inspect.isfunction(member)), None)
    file = code.co_filename if code else getattr(sys.modules.get(cls.__module__), "__file__", None)
    return None if file is None or file.startswith("<") else os.path.realpath(file)


def _short_name(thing: Any) -> str:
    return getattr(thing, "__name__", str(thing))


def _full_name(cls: Any) -> str:
    return f"{getattr(cls, '__module__', '')}.{getattr(cls, '__qualname__', cls)}".removeprefix("__main__.")


def walk(folders: Iterable[str], package: str) -> dict[str, type[Method]]:
    """Imports every file of a package; its methods by the names of their classes."""
    for module in pkgutil.iter_modules(folders, f"{package}."):
        importlib.import_module(module.name)
    return {cls.__name__: cls for cls in _REGISTRY.values() if cls.__module__.startswith(f"{package}.")}


def get(name: str) -> type[Method]:
    """The method class called `name`: a registered name, "module:Class" or "path/file.py:Class".

    Raises:
        LVLMError: no such method.
    """
    return _REGISTRY[find(name)]


def find(name: str) -> str:
    """The registered name of a method; one that comes from elsewhere is imported and registered.

    Raises:
        LVLMError: no such method.
    """
    if ":" in name:
        return _own(config_files.user_object(name, "method"), name)
    name = name.lower()
    if name not in _REGISTRY:
        points = _entry_points()
        if name not in points:
            raise LVLMError(
                f"there is no method {name!r}; expected one of {', '.join(sorted({*_REGISTRY, *points}))}, or your own "
                "as module:Class or file.py:Class"
            )
        _load(points[name])
    return name


def known() -> set[str]:
    """The registered names, without those of other packages that were not imported yet."""
    return set(_REGISTRY)


def names() -> list[str]:
    """All names of methods, sorted; those of other packages too, but for those that cannot be imported."""
    for name, point in _entry_points().items():
        if name not in _BROKEN:
            try:
                _load(point)
            except LVLMError as error:
                _BROKEN.add(name)
                warnings.warn(str(error), stacklevel=2)
    return sorted(_REGISTRY)


def _entry_points() -> dict[str, metadata.EntryPoint]:
    """Methods of other packages that are not registered yet."""
    return {point.name: point for point in metadata.entry_points(group=GROUP) if point.name not in _REGISTRY}


def _load(point: metadata.EntryPoint) -> None:
    where = f"method {point.name!r} of {point.dist.name if point.dist else 'a package'} ({point.value})"
    try:
        found = point.load()
    except Exception as error:  # another package's code, which may raise anything
        raise LVLMError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    if isinstance(found, types.ModuleType):
        if point.name not in _REGISTRY:
            raise LVLMError(
                f"{where} registers no method of that name; write module:Class, or register({point.name!r})"
            )
    else:
        _own(found, point.value, point.name)


def _own(found: Any, words: str, name: str | None = None) -> str:
    """The registered name of a class from elsewhere, which is registered if it is not.

    Raises:
        LVLMError: it is no class of a method.
    """
    if not (isinstance(found, type) and issubclass(found, Method)):
        kind = "a value" if isinstance(found, Method) else f"a {type(found).__name__}"
        if isinstance(found, type):
            kind = "a class, but no methods.Method"
        raise LVLMError(f"method {words!r} is {kind}; expected a class as in class Lift(methods.Method)")
    before = next((key for key, cls in _REGISTRY.items() if cls is found), None)
    if before is not None and name in (None, before):
        return before
    name = name or found.__name__.lower()
    register(name)(found)
    return name
