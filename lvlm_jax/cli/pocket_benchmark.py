"""Compare every method on every benchmark of the pocket world, with intervals, differences to greedy, and controls.

    lvlm pocket-benchmark                                        all methods, 200 images
    lvlm pocket-benchmark --images 60                            60 images to ask about, 200 to describe
    lvlm pocket-benchmark --methods vcd sevi-focused --images 100
    lvlm pocket-benchmark --model smol --dtype bfloat16          smol, and which of the papers' claims hold for it
    lvlm pocket-benchmark --markdown docs/pocket_benchmark.md    also write the tables there

Settings of the methods are in configs/pocket_benchmark.py. OUT/BENCHMARK/METHOD contains answers and scores, with the
controls beside them; a stopped run resumes when it is started again. OUT/table.md has the tables.
"""

import argparse
import re
import time
from collections.abc import Mapping
from pathlib import Path

from lvlm_jax import weights
from lvlm_jax.cli import common
from lvlm_jax.configs import pocket_benchmark as settings
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import controls, statistics
from lvlm_jax.files import write_whole
from lvlm_jax.methods import Method, parse
from lvlm_jax.pocket import benchmark, benchmark_run
from lvlm_jax.weights import names

PARTS = {part.name: part for part in benchmark.PARTS}
DEEP = 24  # from this many layers on, a model uses the papers' own layer numbers, which are for 32 layers


def deep(model: str) -> bool:
    """Whether a model is deep enough for the papers' layer numbers."""
    return weights.model_config(weights.resolve_checkpoint(names.checkpoint(model))).text.num_layers >= DEEP


def chosen(method_names: list[str], published: bool = False) -> dict[str, Method | Mapping[str, Method]]:
    """Name -> method, or a mapping from parts to methods, from configs/pocket_benchmark.py.

    Args:
        method_names: names, "all", or methods with settings such as "vti:fitted=vti.safetensors".
        published: use the papers' own layer numbers.

    Raises:
        LVLMError: there is no such method.
    """
    available: dict = settings.get_published() if published else settings.get_methods()
    chosen_methods: dict[str, Method | Mapping[str, Method]] = {}
    for name in method_names:
        if name.lower() == "all":
            chosen_methods |= available
        elif ":" in name:
            folder = re.sub(r"[^a-z0-9.=]+", "-", name.lower())
            chosen_methods[folder] = parse.as_method(name)
        elif name.lower() not in available:
            raise LVLMError(
                f"configs/pocket_benchmark.py has no method {name!r}; it has all, {', '.join(available)}; your own is "
                "module:Class or file.py:Class"
            )
        else:
            chosen_methods[name.lower()] = available[name.lower()]
    return chosen_methods


def main(arguments: list[str]) -> int:
    """Runs everything that is missing, and writes the tables after every method."""
    parser = common.Parser(prog="lvlm pocket-benchmark", description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["all"], metavar="NAME",
                        help="all, names from configs/pocket_benchmark.py, vti:fitted=FILE, or file.py:Class; several "
                        "may follow each other (default all)")  # fmt: skip
    parser.add_argument(
        "--images", type=common.number(int, 1), default=200, metavar="N", help="test images (default 200)"
    )
    parser.add_argument("--captions", type=common.number(int, 1), default=200, metavar="N",
                        help="test images to describe (default 200)")  # fmt: skip
    parser.add_argument("--model-path", "--model", default="pocket", metavar="PATH",
                        help="smol, or a checkpoint trained on the pocket world (default: the pocket "
                        "model)")  # fmt: skip
    parser.add_argument("--dtype", choices=names.NUMBER_TYPES, default="auto",
                        help="dtype of weights and products (default auto); bfloat16 is fast on CPUs "
                        "with AMX")  # fmt: skip
    parser.add_argument(
        "--batch-size", type=common.number(int, 1), default=64, metavar="N", help="batch size (default 64)"
    )
    parser.add_argument("--seeds", type=common.number(int, 1), metavar="N",
                        help="number of seeds for the images, used in turn (default 1; 3 for a deep "
                        "model)")  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS), metavar="PART",
                        help=f"{', '.join(PARTS)} (default all)")  # fmt: skip
    parser.add_argument("--controls", nargs="+", choices=controls.RUNS, default=list(controls.RUNS), metavar="NAME",
                        help=f"controls to run: {', '.join(controls.RUNS)} (default all; greedy always)")  # fmt: skip
    parser.add_argument("--resamples", type=common.number(int, 1), default=statistics.RESAMPLES, metavar="N",
                        help=f"bootstrap resamples (default {statistics.RESAMPLES})")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/pocket_benchmark"), metavar="DIR",
                        help="folder for images, answers, scores and tables (default "
                        "runs/pocket_benchmark)")  # fmt: skip
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables to this file")
    flags = parser.parse_args(arguments)
    began = time.monotonic()
    published = deep(flags.model_path)
    methods, seeds = chosen(flags.methods, published), flags.seeds or (3 if published else 1)
    setup = benchmark_run.Setup(
        flags.out,
        flags.model_path,
        flags.images,
        flags.captions,
        flags.batch_size,
        flags.resamples,
        command(flags),
        flags.dtype,
        seeds,
        [PARTS[name] for name in PARTS if name in flags.parts],
        settings.get_claims() if published else {},
        flags.controls,
    )
    text = benchmark_run.run(setup, methods)
    if flags.markdown:
        write_whole(flags.markdown, text)
    print(text)
    print(f"{time.monotonic() - began:.0f} s; tables in {flags.out / 'table.md'}")
    return 0


def command(flags: argparse.Namespace) -> str:
    """The command line that makes the same document, without flags that change no figure."""
    words = ["lvlm pocket-benchmark"]
    if flags.model_path != "pocket":
        words += ["--model", flags.model_path]
    if flags.dtype != "auto":
        words += ["--dtype", flags.dtype]
    words += ["--images", str(flags.images), "--captions", str(flags.captions)]
    if flags.seeds:
        words += ["--seeds", str(flags.seeds)]
    if flags.batch_size != 64:
        words += ["--batch-size", str(flags.batch_size)]
    if flags.parts != list(PARTS):
        words += ["--parts", *flags.parts]
    if flags.controls != list(controls.RUNS):
        words += ["--controls", *flags.controls]
    if flags.methods != ["all"]:
        words += ["--methods", *flags.methods]
    return " ".join(words)
