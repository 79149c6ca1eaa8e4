"""Methods from words: names, presets and settings as a command line or a harness gives them."""

import argparse
import dataclasses
import typing

from lvlm_jax import methods


def hyphenated(word: str) -> str:
    """`--top_p=0.9` as `--top-p=0.9`; anything that is not an option stays as it is."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


class Switch(argparse.BooleanOptionalAction):
    """`--name` and `--no-name`."""


def methods_with_field(flag: str) -> list[str]:
    """Names of the methods that have a setting of that flag's name."""
    name = hyphenated(flag).split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
    return [key for key in methods.names() if name in (field.name for field in _fields(key))]


def _members(name: str) -> list[str]:
    """`eah+cmac` names two methods, chained."""
    return name.lower().split("+")


def _fields(name: str) -> list[dataclasses.Field]:
    """The fields of a method that a command line can set."""
    return [field for field in dataclasses.fields(methods.get(name.lower())) if "data" not in field.metadata]


def shown(value) -> str:
    """A setting as the command line takes it."""
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
            among = f" ({', '.join(map(shown, choices))})" if choices else ""
            default = f"{field.default:g}" if isinstance(field.default, float) else shown(field.default)
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
