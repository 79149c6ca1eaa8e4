"""What the command-line programs share: errors in one line, defaults from a config file, a method's fields as flags."""

import argparse
import dataclasses
import importlib.util
import os
import pathlib
import sys
import types
import typing
import warnings
from collections.abc import Callable

import ml_collections

from lvlm_jax import methods
from lvlm_jax.errors import LVLMError


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that takes `--top_p` for `--top-p`, no abbreviations, and raises `LVLMError`."""

    def __init__(self, **settings):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, args, namespace=None):  # noqa: D102
        known, unknown = self.parse_known_args([hyphenated(word) for word in args], namespace)
        if unknown:
            owners = _methods_with_field(unknown[0])
            hint = f"it is a setting of {', '.join(owners)}: choose one with --method" if owners else "see --help"
            raise LVLMError(f"{unknown[0]} is not known here; {hint}")
        return known

    def error(self, message):  # noqa: D102
        raise LVLMError(f"{message}; see --help")


def hyphenated(word: str) -> str:
    """`--top_p=0.9` as `--top-p=0.9`; anything that is not an option stays as it is."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def run(main: Callable[[list[str]], int]) -> typing.NoReturn:
    """Call `main(arguments)` and leave with its exit code; an `LVLMError` is one line on stderr and code 2."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {_one_line(message)}\n"
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without Unicode is no reason to stop
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except LVLMError as error:
        print(f"{pathlib.Path(sys.argv[0]).name}: {_one_line(error)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); the interpreter must not try to write to it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def _one_line(message) -> str:
    return " ".join(str(message).split())


def load_config(path) -> ml_collections.ConfigDict:
    """The `ConfigDict` that `get_config()` of a Python file returns."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise LVLMError(f"config {str(path)!r} is not a file; expected Python with a function get_config()")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None:
        raise LVLMError(f"config {str(path)!r} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:
        raise LVLMError(f"config {str(path)!r} failed: {type(error).__name__}: {error}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise LVLMError(f"get_config() of {str(path)!r} gave {type(config).__name__}; expected a ConfigDict")
    return config


def number(kind: type, low: float | None = None, high: float | None = None, above: float | None = None) -> Callable:
    """A flag type: an int or a float with `low <= value <= high` and `value > above`."""

    def parse(text: str):
        value = kind(text)
        wrong = (
            value != value
            or (low is not None and value < low)
            or (high is not None and value > high)
            or (above is not None and value <= above)
        )
        if wrong:
            bounds = [f">= {low}"] * (low is not None) + [f"> {above}"] * (above is not None)
            bounds += [f"<= {high}"] * (high is not None)
            raise argparse.ArgumentTypeError(f"{text} is out of range, expected {' and '.join(bounds)}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its message about a malformed value
    return parse


# Methods -----------------------------------------------------------------------------------------------------


def _methods_with_field(flag: str) -> list[str]:
    name = hyphenated(flag).split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
    return [
        key for key, kind in sorted(methods.REGISTRY.items()) if name in {field.name for field in _fields(kind)}
    ]


def _fields(kind: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(kind) if field.init]


def _default(field: dataclasses.Field):
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def methods_help() -> str:
    """One line for each registered method: its name, and its fields with their defaults as flags."""
    lines = []
    for name, kind in sorted(methods.REGISTRY.items()):
        flags = (f"--{field.name.replace('_', '-')} {_shown(_default(field))}" for field in _fields(kind))
        lines.append(f"  {name:8s} " + " ".join(flags))
    return "\n".join(lines)


def _shown(value) -> str:
    if value is dataclasses.MISSING:
        return "(required)"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def add_method_flags(parser: argparse.ArgumentParser, name: str) -> None:
    """Add one flag for each field of the method called `name`; raises `LVLMError` when there is no such method."""
    kind = method_class(name)
    group = parser.add_argument_group(f"settings of {name}")
    for field in _fields(kind):
        default = _default(field)
        settings = {"dest": f"field_{field.name}", "default": None}
        if isinstance(default, bool):
            settings["action"] = argparse.BooleanOptionalAction
        else:
            annotation = typing.get_type_hints(kind).get(field.name)
            settings |= {"type": _reader(annotation, default), "metavar": "VALUE"}
            if typing.get_origin(annotation) is typing.Literal:
                settings |= {"choices": typing.get_args(annotation), "metavar": None}
        if not isinstance(default, bool):
            settings["help"] = f"default {_shown(default)}"
        group.add_argument(f"--{field.name.replace('_', '-')}", **settings)


def _reader(annotation, default) -> Callable[[str], typing.Any]:
    """How the text of a flag becomes the value of a method's field."""
    parts = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    if float in parts or isinstance(default, float):
        return float
    if isinstance(default, str):
        return str
    if isinstance(default, int) and default is not None:
        return int

    def layers(text: str):
        if text == "none":
            return None
        values = tuple(int(part) for part in text.split(","))
        return values if "," in text or isinstance(default, tuple) else values[0]

    layers.__name__ = "whole number, list such as 8,9,10, or none:"
    return layers


def _is_union(annotation) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def method_class(name: str) -> type:
    """The method registered under `name`, upper or lower case."""
    try:
        return methods.REGISTRY[name.lower()]
    except KeyError:
        raise LVLMError(f"method {name!r} is not known; expected none, {', '.join(sorted(methods.REGISTRY))}") from None


def build_method(name: str, arguments: argparse.Namespace):
    """The method called `name` with the fields given as flags; None for "none"."""
    if name.lower() == "none":
        return None
    given = {
        key.removeprefix("field_"): value
        for key, value in vars(arguments).items()
        if key.startswith("field_") and value is not None
    }
    try:
        return method_class(name)(**given)
    except TypeError as error:
        raise LVLMError(f"method {name!r} cannot be made: {error}") from error
