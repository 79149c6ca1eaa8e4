"""Prove on this machine that a checkpoint loads, answers and saves as in transformers.

    lvlm verify llava-hf/llava-1.5-7b-hf --record llava.json
    lvlm verify ~/checkpoints/qwen --files-only
    lvlm verify pocket --methods cmac,vcd

The checks depend on what is available. From files alone: the configuration, every tensor's name and shape (from the
headers of the weights, or from their index), token ids and pixels of 13 conversations. With weights: saving and loading
again, every method at strength zero, memory and time. With torch: logits and 32 greedy tokens of three prompts with
images in float32, which takes 4 bytes per parameter, first for transformers and then for this library.

Prints a table, line by line. The record is JSON to paste into an issue: figures, versions and machine, without your
paths. Exit code: 0 if nothing failed, 1 if a check failed, 2 if nothing could be checked.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from lvlm_jax.cli import common
from lvlm_jax.errors import LVLMError
from lvlm_jax.files import expand, write_whole
from lvlm_jax.journal.record import checkpoint_hash
from lvlm_jax.methods import registry
from lvlm_jax.verification import results, run
from lvlm_jax.weights import checkpoint, names


def command_line(words: list[str]) -> argparse.Namespace:
    """Parses the command line; `methods` is a tuple of names."""
    parser = common.Parser(prog="lvlm verify", description=__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help='checkpoint folder, hub id, or "pocket"')
    add("--record", type=Path, metavar="FILE", help="write the results as JSON to this file")
    add("--files-only", action="store_true", help="do not read the weights; for a hub id, they are not downloaded")
    add("--methods", default="all", metavar="NAME,…", help="methods to run at strength zero; all or none (default all)")
    add("--vision-tower", metavar="PATH", help="CLIP folder or hub id for an authors' LLaVA without its tower")
    add("--scratch", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR",
        help="folder for a temporary copy of the weights (default %(default)s)")  # fmt: skip
    arguments = parser.parse_args(words)
    names = arguments.methods.split(",")
    arguments.methods = {"all": tuple(registry.names()), "none": ()}.get(arguments.methods, tuple(names))
    for name in arguments.methods:
        registry.get(name)  # raises with the list of methods
    if not os.path.isdir(arguments.scratch):  # `Path.is_dir` may raise for a long name
        raise LVLMError(f"--scratch {str(arguments.scratch)!r} is not a folder; name one with room for the weights")
    return arguments


def main(words: list[str]) -> int:
    """Checks, prints the table, and writes the record."""
    arguments = command_line(words)
    start = time.monotonic()
    folder = checkpoint.resolve_checkpoint(names.checkpoint(arguments.model), weights=not arguments.files_only)
    checks = []
    options = (arguments.methods, arguments.scratch, arguments.vision_tower, arguments.files_only)
    for result in run.checks(folder, *options):
        print(results.line(result), flush=True)
        checks.append(result)
    print(f"\n{arguments.model}: {results.summary(checks)}, {time.monotonic() - start:.0f} s")
    if arguments.record:
        name = Path(arguments.model).name if os.path.isdir(expand(arguments.model)) else arguments.model
        record = results.record(name, checkpoint_hash(folder), checks, time.monotonic() - start)
        text = json.dumps(record, indent=1, ensure_ascii=False)
        write_whole(arguments.record, text.replace(str(folder), name) + "\n")  # errors may name the folder
        print(f"written to {arguments.record}")
    return int(any(result.status == results.FAILED for result in checks))
