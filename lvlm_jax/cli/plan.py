"""Plans a job before any device is rented: memory of a device by part, what fits, and how fast it can be at best.

    lvlm plan 7b --batch 8 --method cmac
    lvlm plan 72b --devices 8 --tensor 8 --device h100 --device tpu-v5p
    lvlm plan ~/checkpoints/qwen --devices 64 --fsdp 64 --batch 64 --objective sft --full --remat
    lvlm plan 7b 13b 34b 72b --table --device h100 > tables.md

A model is a checkpoint folder, a config.json, or a published size (7b, 13b, 34b, 72b; see --help). Its programs are
compiled ahead of time for as many simulated devices, with shapes for arrays: nothing is allocated, weights need not be
there.
"""

import argparse
import datetime
import json
import pathlib
import sys

from lvlm_jax.cli import common
from lvlm_jax.errors import LVLMError
from lvlm_jax.files import write_atomically
from lvlm_jax.methods import parse
from lvlm_jax.planning import devices, plan
from lvlm_jax.planning import report as plan_report
from lvlm_jax.planning.sizes import SIZES
from lvlm_jax.weights.load import DTYPES
from lvlm_jax.weights.quantize import QUANTS

COUNTS = (1, 8, 64, 512)  # devices in tables
TIMED = "h100"  # what the times of a table are of, where no device is named


def command_line(words: list[str]) -> argparse.Namespace:
    """The command line."""
    name = common.ahead(words, method="none").method
    epilog = f"published sizes: {', '.join(SIZES)}\n\nmethods and their settings:\n{parse.methods_help()}"
    parser = common.Parser(prog="lvlm plan", description=__doc__, epilog=epilog)
    add, count = parser.add_argument, common.number(int, 1)
    add("model", nargs="+", help="folder, config.json or published size; several with --table")
    add("--devices", type=count, metavar="N", help="how many (default: as many as the mesh's sizes make)")
    for axis in ("data", "fsdp", "tensor"):
        add(f"--{axis}", type=int, metavar="N", help=f"size of the mesh's axis {axis}; one may be -1: the rest")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of weights and products (default bfloat16)")
    add("--quant", choices=QUANTS, help="of the decoder's weights, for inference")
    add("--batch", type=count, default=1, metavar="N",
        help="conversations, or pairs of an update; in tables those of a group of devices (default 1)")  # fmt: skip
    add("--images", type=common.number(int, 0), default=1, metavar="N", help="of each (default 1)")
    add("--prompt-tokens", type=count, metavar="N", help="of each, its images' included (default theirs and 48)")
    add("--new-tokens", type=count, default=128, metavar="N", help="longest answer (default 128)")
    add("--method", default="none", metavar="NAME", help="method of inference (default none)")
    add("--objective", default="infer", metavar="NAME",
        help=f"infer, or to train: {', '.join(plan.RECIPES)} (default infer)")  # fmt: skip
    add("--full", action="store_true", help="train the parameters themselves, not adapters")
    add("--train", default=plan.Training("sft").train, metavar="REGEX", help="which of them (default %(default)s)")
    add("--rank", type=count, default=16, metavar="N", help="of adapters (default 16)")
    add("--master", choices=("float32", "bfloat16"), default="float32",
        help="dtype of what is trained, and of the optimizer's moments (default float32)")  # fmt: skip
    add("--accumulate", type=count, default=1, metavar="N", help="parts of an update (default 1)")
    add("--remat", action=argparse.BooleanOptionalAction,
        help="recompute layers in the backward pass (default those of a billion parameters and more)")  # fmt: skip
    add("--device", action="append", metavar="NAME",
        help="what to hold the plan against, may be repeated: " + ", ".join(one.name for one in devices.DEVICES)
        + ", cpu (this machine, measured), or your own as NAME=GiB,GB/s,TFLOP/s (default: all)")  # fmt: skip
    add("--exact", action="store_true", help="compile all layers instead of two and three: minutes")
    add("--table", action="store_true", help="Markdown, for each model on 1, 8, 64 and 512 devices (or --counts)")
    add("--counts", metavar="N,N", help="numbers of devices of the table")
    add("--out", type=pathlib.Path, metavar="FILE", help="write the plans as JSON there too")
    common.method_flags(parser, name)
    arguments = parser.parse_args(words)
    arguments.method = parse.build_method(name, arguments)
    if len(arguments.model) > 1 and not arguments.table:
        raise LVLMError(f"{len(arguments.model)} models were given; expected one, or --table")
    arguments.counts = _counts(arguments.counts)
    return arguments


def job_of(arguments: argparse.Namespace, model: str) -> plan.Job:
    """What the command line says, of one of its models."""
    name, config, folder = plan.read(model)
    training = None
    if arguments.objective != "infer":
        training = plan.Training(
            arguments.objective, not arguments.full, arguments.rank, train=arguments.train,
            master=arguments.master, accumulate=arguments.accumulate, remat=arguments.remat,
        )  # fmt: skip
    count, mesh = _mesh(arguments)
    return plan.Job(
        name, config, count, mesh, arguments.dtype, arguments.batch, arguments.images, arguments.prompt_tokens,
        arguments.new_tokens, arguments.method, arguments.quant, training, folder,
    )  # fmt: skip


def main(words: list[str]) -> int:
    """Plans and prints."""
    arguments = command_line(words)
    names = arguments.device or [one.name for one in devices.DEVICES]
    native = any(name.lower() == devices.CPU for name in names)
    if native and len(names) > 1:
        raise LVLMError("programs for this CPU differ from those for accelerators; plan for --device cpu alone")
    jobs = [job_of(arguments, model) for model in arguments.model]
    if arguments.table:
        jobs = [plan_report.spread(job, count, arguments.batch) for job in jobs for count in arguments.counts]
    most = max(job.devices for job in jobs)
    if not native:
        held = [devices.find(name) for name in names]
    plan.simulate(most)
    if native:
        held = [devices.find(devices.CPU, most)]
    plans = []
    for number, job in enumerate(jobs, 1):
        if arguments.table:
            print(f"{number} of {len(jobs)}: {job.name} on {job.devices}", file=sys.stderr, flush=True)
        plans.append(plan.plan(job, native, arguments.exact))
    if arguments.table:
        timed = held[0] if arguments.device else devices.find(TIMED)
        print(plan_report.table(plans, timed, held), end="")
    else:
        print(plan_report.text(plans[0], held), end="")
    if arguments.out:
        found = {"command": "lvlm plan " + " ".join(words), "date": datetime.date.today().isoformat()}
        found["plans"] = [plan_report.record(one, held) for one in plans]
        write_atomically(arguments.out, json.dumps(found, indent=2) + "\n")
    return 0


def _mesh(arguments: argparse.Namespace) -> tuple[int, tuple[int, int, int]]:
    """How many devices, and the mesh's sizes; an axis that is not given takes what the others leave, or is 1."""
    sizes = [arguments.data, arguments.fsdp, arguments.tensor]
    count = arguments.devices
    if count is None:
        known = [1 if size is None else size for size in sizes]
        if min(known) < 1:
            raise LVLMError("an axis of the mesh takes what the others leave (-1); say of how many --devices")
        return known[0] * known[1] * known[2], tuple(known)
    if None in sizes and -1 not in sizes:
        last = max(i for i in range(3) if sizes[i] is None)
        sizes[last] = -1
    return count, tuple(1 if size is None else size for size in sizes)


def _counts(given: str | None) -> tuple[int, ...]:
    if given is None:
        return COUNTS
    numbers = [part for part in given.split(",") if part]
    if not numbers or not all(part.isdigit() and int(part) for part in numbers):
        raise LVLMError(f"--counts is {given!r}; expected numbers of devices such as 1,8,64")
    return tuple(int(part) for part in numbers)
