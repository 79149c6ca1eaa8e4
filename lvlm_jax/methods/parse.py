"""Parses methods given as text: on a command line, by a harness or by a caller.

none                                  no method
cmac   CMAC                           a method with its defaults
cmac/llava-1.5/pope                   with a preset
cmac:alpha=3,beta=0.1                 with settings, named like its flags
sevi/balanced:layers=8,9,kappa=0.3    with both; numbers up to the next name belong to one setting
eah+cmac:alpha=1                      several methods, chained
mymodule:MyMethod   file.py:MyMethod  a user's own class instead of a name
pai:alpha=0.1,0.2,0.3                 a strength per layer, if the method allows it
learned:FILE                          a file that lvlm train --config learned_method wrote
"""

import argparse
import dataclasses
import re
import typing
from collections.abc import Callable

import jax

from lvlm_jax import errors
from lvlm_jax.attention.layered import Layered
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods import learned, registry
from lvlm_jax.methods.base import Method
from lvlm_jax.methods.chain import chain
from lvlm_jax.methods.fitted import check_model, sources

OWN = re.compile(r"[^:]+:[A-Za-z_][\w.]*(?![\w.=])")  # module:Class, but not name:setting=value


def as_method(value: typing.Any) -> Method | None:
    """Converts any form of a method: a method, None, or a text such as "cmac:alpha=3" or "eah+cmac".

    Raises:
        LVLMError: there is no such method or setting, or the value is a class or has another type.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return build_method(value, argparse.Namespace())
    if isinstance(value, type) and issubclass(value, Method):
        raise LVLMError(f"{value.__name__} is a class; write {value.__name__}()")
    if not isinstance(value, Method):
        hint = "; methods.chain joins several" if isinstance(value, list | tuple) else ""
        raise LVLMError(
            f"method is {errors.shown(value)}; expected a method such as methods.CMAC(alpha=1.0), its name such as "
            f"'cmac', or None{hint}"
        )
    if jax.tree.structure(value) == jax.tree.structure(0):  # a leaf instead of a tree: the class is not registered
        name = type(value).__name__
        raise LVLMError(f'{name} is not registered; write @methods.register("{name.lower()}") above the class')
    return value


def method_for(value: typing.Any, model: Callable[[], str | None], name: str) -> Method | None:
    """`as_method` with a check that fitted and learned arrays belong to the model in use.

    Args:
        value: the method, in any form.
        model: returns the hash of the model's checkpoint, None without one; called only if there is something to check.
        name: the model's name, for messages.

    Raises:
        LVLMError: not a method, or it was fitted or learned for another model.
    """
    method = as_method(value)
    for source in sources(method):
        check_model(source, model(), name)
    return method


def hyphenated(word: str) -> str:
    """Turns `--top_p=0.9` into `--top-p=0.9`; other arguments stay as they are."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


class Switch(argparse.BooleanOptionalAction):
    """A flag with the forms `--name` and `--no-name`."""


def methods_with_field(flag: str) -> list[str]:
    """The methods that have a setting with this flag."""
    name = hyphenated(flag).split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
    return [key for key in registry.names() if name in (field.name for field in _fields(key))]


def _fields(name: str) -> list[dataclasses.Field]:
    """The fields of a method that a command line can set."""
    return [field for field in dataclasses.fields(registry.get(name)) if "data" not in field.metadata]


def shown(value) -> str:
    """Formats a setting as the command line takes it."""
    value = tuple(value.record()) if isinstance(value, Layered) else value
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def methods_help() -> str:
    """One paragraph per registered method: its name, its fields as flags with their defaults, its presets."""
    lines = []
    for name in registry.names():
        method = registry.get(name)
        about = (method.__doc__ or "").splitlines()[0].partition("; see the module")[0]
        lines.append(f"  {name}: {about.rstrip('.')}.")
        width = max([len("preset"), *(len(_flag(field)) for field in _fields(name))])
        for field in _fields(name):
            choices = field.metadata["choices"] if field.metadata.get("static") else None
            among = f" ({', '.join(map(shown, choices))})" if choices else ""
            default = f"{field.default:g}" if isinstance(field.default, float) else shown(field.default)
            default = default if len(default) <= 11 else f"{default[:10]}…"
            lines.append(f"      --{_flag(field):{width}} {default:11} {field.metadata['doc']}{among}")
        if method.PRESETS:
            lines.append(f"      --{'preset':{width}} {'':11s} settings as published: {', '.join(method.PRESETS)}")
    lines += [
        "",
        "  Learned strengths: --method learned:FILE, a file of lvlm train --config learned_method.",
        "  Your own: --method mymodule:MyMethod or --method file.py:MyMethod, a class of methods.Method.",
        "  Two methods at once: --method eah+cmac. Every setting has a flag with the method's name (--vcd-seed,",
        "  --icd-prompt, --cmac-preset); the short flag exists if no other method and no flag above has that name.",
    ]
    return "\n".join(lines)


def _flag(field: dataclasses.Field) -> str:
    return field.name.strip("_").replace("_", "-")


def add_method_flags(parser: argparse.ArgumentParser, words: str) -> None:
    """Adds `--preset` and one flag for each field of the methods in `words`.

    Every field gets the flag `--method-field`, and also `--field` if that name is free.

    Raises:
        LVLMError: there is no such method.
    """
    if learned.path_of(words):
        return
    members = list(dict.fromkeys(member.name for member in _members(words)))
    used = {option for action in parser._actions for option in action.option_strings}
    shared = [f"--{_flag(field)}" for member in members for field in _fields(member)]
    for member in members:
        for flag, settings in [("preset", {}), *((_flag(f), _flag_settings(f)) for f in _fields(member))]:
            long, short = f"--{member.replace('_', '-')}-{flag}", f"--{flag}"
            ambiguous = short in used or shared.count(short) > 1 or (flag == "preset" and len(members) > 1)
            names = [long] if ambiguous else [long, short]
            dest = f"field_{member}.{flag}"
            parser.add_argument(*names, dest=dest, default=None, help=argparse.SUPPRESS, **settings)


def _flag_settings(field: dataclasses.Field) -> dict[str, typing.Any]:
    choices = field.metadata["choices"] if field.metadata.get("static") else None
    if isinstance(field.default, bool) or True in (choices or ()):
        return {"action": Switch}
    if field.metadata.get("fitted"):
        return {"metavar": "FILE"}
    if not field.metadata.get("static"):
        return {"type": float if field.metadata.get("per", "model") == "model" else _by_layer}
    if choices:
        return {"choices": choices}
    return {"type": _word_or_numbers if isinstance(field.default, str) else _numbers}


def _numbers(text: str) -> int | float | tuple[int, ...] | None:
    """Parses `8` and `0.25` as numbers, `8,9,10` as a tuple, `none` as None."""
    if text == "none":
        return None
    if "," in text:
        return tuple(int(part) for part in text.split(",") if part)
    return float(text) if "." in text else int(text)


def _by_layer(text: str) -> float | tuple[float, ...]:
    """Parses `0.5` as a number, `0.1,0.2` as one number per layer."""
    return tuple(float(part) for part in text.split(",")) if "," in text else float(text)


# argparse prints these names if a value is malformed.
_by_layer.__name__ = "number"
_numbers.__name__ = "number, several joined by commas, or none"


def _word_or_numbers(text: str) -> str | tuple[int, ...]:
    """Returns `low` as it is; parses `8,9,10` as a tuple."""
    return tuple(int(part) for part in text.split(",")) if text.replace(",", "").isdigit() else text


class _Member(typing.NamedTuple):
    """One parsed method: its registered name, the name of its preset or None, and its settings by field."""

    name: str
    preset: str | None
    settings: dict[str, typing.Any]


def _members(words: str) -> list[_Member]:
    """Parses methods joined by "+", in order.

    Raises:
        LVLMError: an unknown method, preset or setting, or an invalid value.
    """
    parts = re.split(r"(?<!\de)\+", words.strip())  # "+" separates methods, except in a number such as 1e+3
    members = []
    while parts:
        name, preset, settings = _split(parts.pop(0))
        if parts and preset and not settings:  # the name of a preset may contain a "+"
            more, _, after = parts[0].partition(":")
            if f"{preset}+{more}" in registry.get(name).PRESETS:
                preset, settings = f"{preset}+{more}", after
                del parts[0]
        members.append(_Member(name, preset, _settings(name, settings)))
    return members


def _split(part: str) -> tuple[str, str | None, str]:
    """The registered name, the preset (or None) and the settings of one method."""
    own = OWN.match(part)
    word = own[0] if own else re.match("[^:/]*", part)[0]
    preset, _, settings = part[len(word) :].partition(":")
    try:
        name = registry.find(word)
    except LVLMError as error:
        short, _, setting = word.partition(":")
        if short.lower() not in registry.known():
            raise
        raise LVLMError(f"{error}; a setting of {short} is {setting}=VALUE") from error
    return name, preset[1:] if preset else None, settings


def _settings(name: str, text: str) -> dict[str, typing.Any]:
    """Parses `alpha=3,layers=8,9` into fields of the method called `name`."""
    fields = {field.name.strip("_"): field for field in _fields(name)}
    settings = {}
    for part in re.split(r",(?=\s*[A-Za-z_][\w-]*\s*=)", text) if text else ():
        key, equals, value = part.partition("=")
        field = fields.get(key.strip().replace("-", "_").strip("_"))
        if field is None or not equals:
            raise LVLMError(
                f"{name} has no setting {part.strip()!r}; expected name=value with one of {', '.join(fields)}"
            )
        settings[field.name] = _value(name, field, value.strip().strip("[]"))
    return settings


def _value(name: str, field: dataclasses.Field, text: str) -> typing.Any:
    if text.lower() == "none" and (field.default is None or None in (field.metadata.get("choices") or ())):
        return None
    flag = _flag_settings(field)
    if flag.get("action") is Switch:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return flag.get("type", str)(text)
    except ValueError as error:
        raise LVLMError(f"{name}: {field.name.strip('_')} is {text!r}; expected a number") from error


def build_method(words: str, arguments: argparse.Namespace) -> Method | None:
    """Builds the method that `words` names (see the module docstring) with the given flags; None for "none".

    A flag takes precedence over a setting in the words, and both over a preset.

    Raises:
        LVLMError: an unknown method, preset or setting, a value out of range, or methods that contradict each other.
    """
    if words.strip().lower() == "none":
        return None
    if path := learned.path_of(words):
        return learned.read(path)
    return chain(*(_build(member, vars(arguments)) for member in _members(words)))


def _build(member: _Member, flags: dict[str, typing.Any]) -> Method:
    method = registry.get(member.name)
    changes = dict(member.settings)
    for field in _fields(member.name):
        value = flags.get(f"field_{member.name}.{_flag(field)}")
        if value is not None:
            changes[field.name] = value
    presets = [flags.get(f"field_{member.name}.preset"), member.preset]
    for preset in filter(None, presets):
        changes = method.preset_settings(preset, changes)
    return method(**changes)
