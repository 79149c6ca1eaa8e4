"""Names of methods: those of this package, of other packages, and of a user's own files.

Every file in `lvlm_jax/methods/` is imported. Another package declares its methods as entry points,

    [project.entry-points."lvlm_jax.methods"]
    lift = "my_package.lift:Lift"

which are imported when that name, or the list of all names, is needed. Wherever a name is accepted, "module:Class" and
"path/file.py:Class" name a user's own class.
"""

import dataclasses
import difflib
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

GROUP = "lvlm_jax.methods"  # the group of the entry points
NAME = re.compile(r"[a-z][a-z0-9_-]*")
WORDS = ("none", "greedy")  # names that mean no method

_REGISTRY: dict[str, type[Method]] = {}
_BROKEN: set[str] = set()  # entry points that have already caused a warning


@dataclass_transform(frozen_default=True, field_specifiers=(strength, switch, data, fitted))
def register(name: str | Any) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: makes a method a frozen dataclass and a pytree, and gives it a name for the command line.

    A class may be registered again (a reloaded module, one imported under two names, a notebook cell); the new class
    takes the name. The argument is typed `Any` so that a wrong type gets a clear error.

    Raises:
        LVLMError: the name or the class is invalid; the message says what to do.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name) or name in WORDS:
        argument = getattr(name, "__name__", name)
        raise LVLMError(
            f"register got {argument!r}; expected a name of lower-case letters, digits, - and _, as in "
            '@methods.register("lift")'
        )

    def decorate(cls: type[Method] | Any) -> type[Method]:
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise LVLMError(f"{_full_name(cls)} is not a method; write class {_short_name(cls)}(methods.Method)")
        registered = _REGISTRY.get(name)
        if registered is not None and not _same(registered, cls):
            raise LVLMError(
                f"the name {name!r} belongs to {_full_name(registered)}; give {_full_name(cls)} another one in "
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
    """Refuses fields that the command line cannot show, and fields with the name of a stage."""
    fields = dataclasses.fields(cls)
    for field in fields:
        name = f"{cls.__name__}: the field {field.name}"
        if "doc" not in field.metadata:
            raise LVLMError(
                f'{name} has no description; write {field.name} = methods.strength(default, "what it is") for a number '
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


# Names that a field may not have. `layers` and `rows` are allowed: many methods have fields of these names.
HOOKS = {name for name in dir(Method) if name[0] != "_"} - {"layers", "rows"}


def _same(old: type, new: type) -> bool:
    """Whether `new` comes from the same definition as `old`, which was executed again."""
    if old.__qualname__ != new.__qualname__:
        return False
    return old is new or old.__module__ == new.__module__ or (old._source is not None and old._source == _source(new))


def _source(cls: type) -> str | None:
    """The file of a class, or None."""
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
    """Imports every file of a package; returns its methods by class name."""
    for module in pkgutil.iter_modules(folders, f"{package}."):
        importlib.import_module(module.name)
    return {cls.__name__: cls for cls in _REGISTRY.values() if cls.__module__.startswith(f"{package}.")}


def get(name: str) -> type[Method]:
    """The method class of a registered name, "module:Class" or "path/file.py:Class".

    Raises:
        LVLMError: there is no such method.
    """
    return _REGISTRY[find(name)]


def find(name: str) -> str:
    """The registered name of a method; a class from elsewhere is imported and registered.

    Raises:
        LVLMError: there is no such method.
    """
    if ":" in name:
        return _own(config_files.user_object(name, "method"), name)
    name = name.lower()
    if name not in _REGISTRY:
        points = _entry_points()
        if name not in points:
            others = sorted({*_REGISTRY, *points})
            close = difflib.get_close_matches(name, others, n=1)
            hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(others)}"
            raise LVLMError(f"there is no method {name!r}; {hint} (or your own, as module:Class or file.py:Class)")
        _load(points[name])
    return name


def known() -> set[str]:
    """The registered names, without those of other packages that are not imported yet."""
    return set(_REGISTRY)


def names() -> list[str]:
    """All names of methods, sorted, including methods of other packages; omits methods that cannot be imported."""
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
        loaded = point.load()
    except Exception as error:  # another package's code may raise anything
        raise LVLMError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    if isinstance(loaded, types.ModuleType):
        if point.name not in _REGISTRY:
            raise LVLMError(
                f"{where} registers no method of that name; write module:Class, or register({point.name!r})"
            )
    else:
        _own(loaded, point.value, point.name)


def _own(value: Any, words: str, name: str | None = None) -> str:
    """Registers a class from elsewhere, if necessary; returns its registered name.

    Raises:
        LVLMError: it is not a class of a method.
    """
    if not (isinstance(value, type) and issubclass(value, Method)):
        kind = "a value" if isinstance(value, Method) else f"a {type(value).__name__}"
        if isinstance(value, type):
            kind = "a class, but not a methods.Method"
        raise LVLMError(f"method {words!r} is {kind}; expected a class as in class Lift(methods.Method)")
    before = next((key for key, cls in _REGISTRY.items() if cls is value), None)
    if before is not None and name in (None, before):
        return before
    name = name or value.__name__.lower()
    register(name)(value)
    return name
