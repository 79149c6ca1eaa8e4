"""`lvlm COMMAND ...`: finds the command and calls it. Only the command itself imports modules that are slow to
import."""

import difflib
import importlib
import os
import sys
from types import ModuleType
from typing import NoReturn

from lvlm_jax.version import __version__

# Each command is the module of its name in this folder (with _ for -); its `main(words)` returns the exit code.
COMMANDS = {
    "infer": "ask a model about images, with or without a method; without arguments: the demo",
    "attention": "draw where a model looks while it answers, word by word",
    "serve": "answer OpenAI clients over HTTP, with a method chosen by each request",
    "sweep": "answer the same questions under many strengths of one method",
    "evaluate": "score a benchmark: a model's answers, or existing ones",
    "report": "report all scores on one page",
    "fit": "fit what some methods need, such as directions or heads, on pairs of answers",
    "preferences": "make preference pairs for training",
    "train": "train a model: CAPL, DPO, flow alignment, fine-tuning, or the pocket model from scratch",
    "convert": "convert a checkpoint, or merge an adapter into it",
    "verify": "prove that a checkpoint loads, answers and saves as in transformers",
    "plan": "plan the memory and time of a job on many devices, before you rent them",
    "pocket-world": "write a split of the pocket world: images, annotations, questions",
    "pocket-benchmark": "compare every method on every benchmark of the pocket world",
    "pocket-training": "run the training recipes on the pocket world, and measure their effects",
    "pocket-report": "measure the abilities of a checkpoint of the pocket world",
}
ON_CPU = ("convert", "pocket-world")  # these do not need an accelerator

USAGE = """\
usage: lvlm COMMAND [arguments]

Run, measure and train vision-language models and methods against hallucination.

commands:
{}

  lvlm COMMAND --help   flags and examples of a command
  lvlm --version        the version
"""


def usage() -> str:
    """The text of `lvlm --help`."""
    width = max(map(len, COMMANDS))
    return USAGE.format("\n".join(f"  {name:{width}}  {about}" for name, about in COMMANDS.items()))


def command(name: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"lvlm_jax.cli.{name.replace('-', '_')}")


def run(name: str, words: list[str] | None = None) -> NoReturn:
    """Runs a command with `words` (by default those of the command line), and exits with its exit code."""
    if name in ON_CPU:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # `sys.argv[0]` is the prefix of every message of the process, also of those from `parallel`.
    sys.argv = [f"lvlm {name}", *(sys.argv[1:] if words is None else words)]
    from lvlm_jax.cli import common

    # Imported within `run`, which first configures the logging of libraries.
    common.run(lambda arguments: command(name).main(arguments))


def main() -> NoReturn:
    """The console script: runs the command that the command line names."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(usage(), end="")
        sys.exit(0)
    if name == "--version":
        print(f"lvlm_jax {__version__}")
        sys.exit(0)
    if name.replace("_", "-") not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else "lvlm --help lists the commands"
        print(f"lvlm: {name!r} is not a command; {hint}", file=sys.stderr)
        sys.exit(2)
    run(name.replace("_", "-"), words)
