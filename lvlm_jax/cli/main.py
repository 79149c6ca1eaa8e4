"""`lvlm COMMAND ...`: finds the command and calls it. Nothing is imported before that is slow to import."""

import difflib
import importlib
import os
import sys
from types import ModuleType
from typing import NoReturn

from lvlm_jax.version import __version__

# Each command is the module of its name in this folder (with _ for -); its `main(words)` gives the exit code.
COMMANDS = {
    "infer": "ask a model about images, with or without a method; without arguments: the demo",
    "attention": "draw where a model looks while it answers, word by word",
    "serve": "answer OpenAI clients over HTTP, with a method chosen by each request",
    "sweep": "answer the same questions under many strengths of one method",
    "evaluate": "score a benchmark: a model's answers, or answers that are there",
    "report": "put everything that was scored on one page",
    "fit": "measure what a method needs first, such as directions or heads, on pairs of answers",
    "preferences": "make preference pairs to train on",
    "train": "train a model: CAPL, DPO, flow alignment, fine-tuning, or the pocket model from scratch",
    "convert": "write a checkpoint in another form, or with an adapter merged",
    "verify": "prove that a checkpoint loads, answers and saves as in transformers",
    "plan": "say what a job needs on which devices, before any is rented",
    "pocket-world": "write a split of the drawn world: images, annotations, questions",
    "pocket-benchmark": "compare every method on every benchmark of the drawn world",
    "pocket-training": "run the training recipes on the drawn world, and say what each changes",
    "pocket-report": "say what a checkpoint of the drawn world can and cannot do",
}
ON_CPU = ("convert", "pocket-world")  # have no use for an accelerator's memory

USAGE = """\
usage: lvlm COMMAND [arguments]

Run, measure and train vision-language models and methods against hallucination.

commands:
{}

  lvlm COMMAND --help   what a command takes, with examples
  lvlm --version        the version
"""


def usage() -> str:
    """What `lvlm --help` prints."""
    width = max(map(len, COMMANDS))
    return USAGE.format("\n".join(f"  {name:{width}}  {about}" for name, about in COMMANDS.items()))


def command(name: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"lvlm_jax.cli.{name.replace('-', '_')}")


def run(name: str, words: list[str] | None = None) -> NoReturn:
    """Runs a command with `words`, by default those of the command line, and leaves with its exit code."""
    if name in ON_CPU:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # What every message of the process, also those of `parallel`, begins with.
    sys.argv = [f"lvlm {name}", *(sys.argv[1:] if words is None else words)]
    from lvlm_jax.cli import common

    # Imported within `run`, which first sees to what libraries say while they are imported.
    common.run(lambda given: command(name).main(given))


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
        print(f"lvlm: {name!r} is no command; {hint}", file=sys.stderr)
        sys.exit(2)
    run(name.replace("_", "-"), words)
