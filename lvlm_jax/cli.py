"""What the command-line programs share: errors in one line, defaults from a config file, a method's fields as flags."""

import argparse
import dataclasses
import importlib.util
import os
import pathlib
import sys
import typing
import warnings
from collections.abc import Callable

import jax
import ml_collections

from lvlm_jax import methods
from lvlm_jax.errors import LVLMError
from lvlm_jax.parallel import processes


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that takes `--top_p` for `--top-p`, no abbreviations, and raises `LVLMError`."""

    def __init__(self, **settings):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, args, namespace=None):  # noqa: D102
        known, unknown = self.parse_known_args([hyphenated(word) for word in args], namespace)
        if unknown:
            owners = _methods_with_field(unknown[0])
            hint = f"it is a setting of --method {' or '.join(owners)}" if owners else "see --help"
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
    """Call `main(arguments)` and leave with its exit code; an `LVLMError` is one line on stderr and code 2.

    Where this is one of several processes and another one is gone, that is one line too, and code 134.
    """
    # Its remarks (such as on long prompts) come before errors of ours that say the same.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {_one_line(message)}\n"
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without Unicode is no reason to stop
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except LVLMError as error:
        if processes.lost(error):
            code = processes.account_for(error)
        else:
            print(f"{pathlib.Path(sys.argv[0]).name}: {_one_line(error)}", file=sys.stderr)
            code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); the interpreter must not try to write to it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if not processes.joined():
            raise
        code = processes.account_for(error)
    if code and processes.joined():
        processes.leave(code)
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


class Switch(argparse.BooleanOptionalAction):
    """`--name` and `--no-name`."""


def flags(
    parser: argparse.ArgumentParser, defaults: ml_collections.ConfigDict, title: str | None = None
) -> Callable:
    """An `add_argument` for a group of flags whose defaults come from a config, and stand in their help."""
    group = parser.add_argument_group(title) if title else parser

    def add(*names: str, help: str, **settings):
        default = defaults.get(names[0].removeprefix("--").replace("-", "_"))
        shown = "" if default is None or default is False else f" (default {_shown(default)})"
        if settings.get("action") == "append":
            settings["default"] = list(default or ())
        else:
            settings["default"] = default
        group.add_argument(*names, help=help + shown, **settings)

    return add


def pocket_file(name: str) -> pathlib.Path:
    """A file or folder of the pocket model, which is part of the package."""
    return pathlib.Path(__file__).parent / "pocket" / name


def checkpoint(name: str) -> str:
    """What `LVLM.from_pretrained` takes for `--model-path`: `pocket` is the model inside the package."""
    return str(pocket_file("checkpoint")) if name == "pocket" else os.path.expanduser(name)


def dtype(name: str) -> str:
    """`auto` is float32 on a CPU, where XLA converts bfloat16 weights on every call, and bfloat16 elsewhere."""
    if name != "auto":
        return name
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def quant(name: str) -> str | None:
    """What `LVLM.from_pretrained` takes for `--quant`."""
    return None if name == "none" else name


def precision(dtype: str, quant: str | None) -> str:
    """How the record of a run names the precision of its model."""
    return dtype if quant is None else f"{dtype} with {quant} kernels"


def number(
    kind: type, low: float | None = None, high: float | None = None, above: float | None = None
) -> Callable:
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


def _methods_with_field(flag: str) -> list[str]:
    name = hyphenated(flag).split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
    return [key for key in methods.names() if name in (field.name for field in _fields(key))]


def _members(name: str) -> list[str]:
    """`eah+cmac` names two methods, chained."""
    return name.lower().split("+")


def _fields(name: str) -> list[dataclasses.Field]:
    """The fields of a method that a command line can set."""
    return [field for field in dataclasses.fields(methods.get(name.lower())) if "data" not in field.metadata]


def _shown(value) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def methods_help() -> str:
    """A paragraph for each registered method: its name, its fields as flags with their defaults, its presets."""
    lines = []
    for name in methods.names():
        method = methods.get(name)
        lines.append(f"  {name}: {(method.__doc__ or '').splitlines()[0]}")
        for field in _fields(name):
            choices = field.metadata["choices"] if field.metadata.get("static") else None
            among = f" ({', '.join(map(_shown, choices))})" if choices else ""
            default = f"{field.default:g}" if isinstance(field.default, float) else _shown(field.default)
            lines.append(f"      --{_flag(field):12s} {default:11.11s} {field.metadata['doc']}{among}")
        if method.PRESETS:
            lines.append(
                f"      --{'preset':12s} {'':11s} settings as published: {', '.join(method.PRESETS)}"
            )
    lines += [
        "",
        "  Two methods at once: --method eah+cmac. A setting whose name is taken (by another method, or by a flag",
        "  above) carries the method's name: --vcd-seed, --icd-prompt, --cmac-preset; it always may.",
    ]
    return "\n".join(lines)


def _flag(field: dataclasses.Field) -> str:
    return field.name.strip("_").replace("_", "-")


def add_method_flags(parser: argparse.ArgumentParser, name: str) -> None:
    """Add `--preset` and one flag for each field of the method (or the methods, joined by +) called `name`.

    Every flag exists as `--method-field`; as `--field` too, where that name is free.

    Raises:
        LVLMError: there is no such method.
    """
    members = _members(name)
    taken = {option for action in parser._actions for option in action.option_strings}
    shared = [f"--{_flag(field)}" for member in members for field in _fields(member)]
    for member in members:
        for flag, settings in [("preset", {}), *((_flag(f), _flag_settings(f)) for f in _fields(member))]:
            long, short = f"--{member.replace('_', '-')}-{flag}", f"--{flag}"
            ambiguous = short in taken or shared.count(short) > 1 or (flag == "preset" and len(members) > 1)
            names = [long] if ambiguous else [long, short]
            dest = f"field_{member}.{flag}"
            parser.add_argument(*names, dest=dest, default=None, help=argparse.SUPPRESS, **settings)


def _flag_settings(field: dataclasses.Field) -> dict[str, typing.Any]:
    choices = field.metadata["choices"] if field.metadata.get("static") else None
    if isinstance(field.default, bool) or True in (choices or ()):
        return {"action": Switch}
    if not field.metadata.get("static"):
        return {"type": float}
    if choices:
        return {"choices": choices}
    return {"type": _word_or_numbers if isinstance(field.default, str) else _numbers}


def _numbers(text: str) -> int | float | tuple[int, ...] | None:
    """`8` and `0.25` as numbers, `8,9,10` as a tuple, `none` as None."""
    if text == "none":
        return None
    if "," in text:
        return tuple(int(part) for part in text.split(",") if part)
    return float(text) if "." in text else int(text)


def _word_or_numbers(text: str) -> str | tuple[int, ...]:
    """`low` as it is, `8,9,10` as a tuple."""
    return tuple(int(part) for part in text.split(",")) if text.replace(",", "").isdigit() else text


def build_method(name: str, arguments: argparse.Namespace) -> methods.Method | None:
    """The method called `name` (several joined by + are chained), from presets and flags; None for "none".

    Raises:
        LVLMError: an unknown method or preset, a setting out of range, methods that contradict each other.
    """
    if name.lower() == "none":
        return None
    return methods.chain(*(_build(member, arguments) for member in _members(name)))


def _build(name: str, arguments: argparse.Namespace) -> methods.Method:
    method = methods.get(name)
    given = {}
    preset = vars(arguments).get(f"field_{name}.preset")
    if preset is not None:
        method.preset(preset)  # names the presets there are when this is none of them
        given |= method.PRESETS[preset]
    for field in _fields(name):
        value = vars(arguments).get(f"field_{name}.{_flag(field)}")
        if value is not None:
            given[field.name] = value
    return method(**given)
