"""Loads what users write in Python: configuration files, and single objects such as a method or a corrector."""

import contextlib
import difflib
import importlib
import importlib.machinery
import importlib.util
import os
import pathlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import ml_collections

from lvlm_jax import files
from lvlm_jax.errors import LVLMError

SHIPPED = pathlib.Path(__file__).parent / "configs"


def config_names() -> list[str]:
    """Names of the configuration files in `configs/`, which ship with the package."""
    files = SHIPPED.glob("[a-z]*.py")
    return sorted(path.stem for path in files if "def get_config(" in path.read_text(encoding="utf-8"))


def config_file(name: str | os.PathLike) -> pathlib.Path:
    """The path of a configuration: a single word such as "capl" is a file of `configs/`, anything else is a path.

    Raises:
        LVLMError: there is no such file.
    """
    if str(name) in config_names():
        return SHIPPED / f"{name}.py"
    path = files.expand(name)
    if path.is_file():
        return path
    if str(name).isidentifier():
        names = config_names()
        close = difflib.get_close_matches(str(name), names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
        raise LVLMError(f"there is no config {str(name)!r}; {hint} (or give the path of a file)")
    raise LVLMError(f"config {str(name)!r} is not a file; expected Python with a function get_config()")


def load_config(name: str | os.PathLike) -> ml_collections.ConfigDict:
    """Runs `get_config()` of a Python file and returns its `ConfigDict`.

    Args:
        name: a path, or the name of a file in `configs/`; see `config_file`.

    Raises:
        LVLMError: there is no such file, its code fails, or it has no `get_config()` that returns a `ConfigDict`.
    """
    path = config_file(name)
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None:
        raise LVLMError(f"config {str(path)!r} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except (Exception, SystemExit) as error:
        raise LVLMError(f"config {str(path)!r} failed: {type(error).__name__}: {error}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise LVLMError(f"get_config() of {str(path)!r} gave {type(config).__name__}; expected a ConfigDict")
    return config


def user_object(name: str, what: str) -> Any:
    """Loads an object from the user's own code.

    Args:
        name: "module:attribute" or "path/file.py:attribute". A file module.py in the current folder takes precedence
            over an installed module of that name. The attribute may contain dots.
        what: the object's purpose, such as "method"; error messages begin with it.

    Raises:
        LVLMError: there is no such module, file or attribute, or its code fails.
    """
    module = user_module(name, what)
    source, attribute = _split(name, what)
    value: Any = module
    for part in attribute.split("."):
        try:
            value = getattr(value, part)
        except AttributeError as error:
            kind = "file" if source.endswith(".py") else "module"
            raise LVLMError(f"{what} {name!r}: there is no {attribute} in {kind} {source}") from error
    return value


def user_module(name: str, what: str) -> ModuleType:
    """Imports the module that `user_object` reads from. Its code runs once, even if it is imported many times.

    Raises:
        LVLMError: there is no such module or file, or its code fails.
    """
    source, _ = _split(name, what)
    folder = pathlib.Path.cwd()
    try:
        if source.endswith(".py"):
            file = files.expand(source).resolve()
            if not file.is_file():
                raise LVLMError(f"{what} {name!r}: there is no file {source} in {str(folder)!r}")
            return _module_of_file(file, file.stem)
        file = folder / f"{source}.py"
        if file.is_file():
            return _module_of_file(file.resolve(), source)
        with _neighbours(folder):
            return importlib.import_module(source)
    except LVLMError:
        raise
    # Importing runs the user's code, which may raise anything.
    except (Exception, SystemExit) as error:
        kind = "file" if source.endswith(".py") else "module"
        absent = isinstance(error, ModuleNotFoundError) and error.name == source
        hint = f", and there is no {source}.py in {str(folder)!r}" if absent else ""
        raise LVLMError(
            f"{what} {name!r}: {kind} {source} cannot be imported ({type(error).__name__}: {error}){hint}"
        ) from error


def _split(name: str, what: str) -> tuple[str, str]:
    source, _, attribute = name.rpartition(":")
    if not source or not all(part.isidentifier() for part in attribute.split(".")):
        raise LVLMError(f"{what} {name!r} is not understood; expected module:name or path/file.py:name")
    return source, attribute


def _module_of_file(file: pathlib.Path, name: str) -> ModuleType:
    """Imports a file as module `name`, or under its path if another module has that name."""
    for module_name in (name, str(file)):
        loaded = sys.modules.get(module_name)
        if loaded is not None and os.path.realpath(getattr(loaded, "__file__", None) or "") == str(file):
            return loaded
    if name in sys.modules:
        name = str(file)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module there
    try:
        with _neighbours(file.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class _Neighbours:
    """Finds modules in one folder, if Python finds them nowhere else."""

    def __init__(self, folder: pathlib.Path):
        self.folder = str(folder)

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.PathFinder.find_spec(name, [self.folder] if path is None else path)


@contextlib.contextmanager
def _neighbours(folder: pathlib.Path) -> Iterator[None]:
    """Lets the user's code import modules from its own folder."""
    finder = _Neighbours(folder)
    sys.meta_path.append(finder)
    importlib.invalidate_caches()  # the folder may contain files that are newer than the importer's cache
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
