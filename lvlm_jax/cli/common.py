"""Shared by the commands: errors in one line, and flags whose defaults come from a config file."""

import argparse
import difflib
import os
import pathlib
import re
import sys
import typing
import warnings
from collections.abc import Callable

import ml_collections

from lvlm_jax.errors import LVLMError, one_line
from lvlm_jax.methods import parse
from lvlm_jax.parallel import processes


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that accepts `--top_p` for `--top-p`, allows no abbreviations, and raises `LVLMError`."""

    def __init__(self, **settings):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, args, namespace=None):  # noqa: D102
        namespace_parsed, unknown = self.parse_known_args([parse.hyphenated(word) for word in args], namespace)
        if unknown:
            owners = parse.methods_with_field(unknown[0])
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
            hint = f"did you mean {close[0]}?" if close else "see --help"
            hint = f"it is a setting of --method {' or '.join(owners)}" if owners else hint
            raise LVLMError(f"{unknown[0]} is not a flag of this command; {hint}")
        return namespace_parsed

    def error(self, message):  # noqa: D102
        wrong = re.fullmatch(r"argument (?:\S*/)?(--\S+): invalid (.+?) value: (.*)", message, re.DOTALL)
        if wrong:
            expected = {"float": "number", "int": "whole number"}.get(wrong[2], wrong[2])
            raise LVLMError(f"{wrong[1]} is {wrong[3]}; expected a {expected}")
        raise LVLMError(f"{message}; see --help")


def run(main: Callable[[list[str]], int]) -> typing.NoReturn:
    """Calls `main(arguments)` and exits with its exit code; an `LVLMError` is one line on stderr and code 2.

    If this is one of several processes and another one died, the message is also one line, and the code is 134.
    """
    # transformers would warn (for example about a long prompt) before our error says the same.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {one_line(message)}\n"
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without Unicode must not stop us
    try:
        for word in sys.argv[1:]:
            if any("\ud800" <= letter <= "\udbff" for letter in word):  # no file can have such a name
                raise LVLMError(f"{word[:40]!r} holds half of a character; write the word again")
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except LVLMError as error:
        if processes.lost(error):
            code = processes.account_for(error)
        else:
            print(f"{pathlib.Path(sys.argv[0]).name}: {error}", file=sys.stderr)
            code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # The reader of our output has exited (`| head`); the interpreter must not try to write to it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if not processes.joined():
            raise
        code = processes.account_for(error)
    if code and processes.joined():
        processes.leave(code)
    sys.exit(code)


def ahead(words: list[str], **defaults: str | None) -> argparse.Namespace:
    """Parses some flags before the complete parser is built: the flag `--method` determines which others exist.

    Args:
        words: the command line.
        defaults: name of a flag, with _ for -, and its default; all other flags are ignored.
    """
    parser = Parser(add_help=False)
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=default)
    return parser.parse_known_args([parse.hyphenated(word) for word in words])[0]


def method_flags(parser: argparse.ArgumentParser, words: str) -> None:
    """Adds the flags of the methods that `words` names; "none" adds no flag.

    Raises:
        LVLMError: there is no such method.
    """
    if words.strip().lower() != "none":
        parse.add_method_flags(parser, words)


def flags(parser: argparse.ArgumentParser, defaults: ml_collections.ConfigDict, title: str | None = None) -> Callable:
    """An `add_argument` for a group of flags with defaults from a config, which the help texts show."""
    group = parser.add_argument_group(title) if title else parser

    def add(*names: str, help: str, **settings):
        default = defaults.get(names[0].removeprefix("--").replace("-", "_"))
        default_text = "" if default is None or default is False else f" (default {parse.shown(default)})"
        if settings.get("action") == "append":
            settings["default"] = list(default or ())
        else:
            settings["default"] = default
        group.add_argument(*names, help=help + default_text, **settings)

    return add


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

    parse.__name__ = kind.__name__  # argparse prints this name if a value is malformed
    return parse
