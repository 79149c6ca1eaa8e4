"""Plans a job before any device is rented: memory per device by part, what fits, and the best possible speed.

    lvlm plan 7b --batch 8 --method cmac
    lvlm plan 72b --devices 8 --tensor 8 --device h100 --device tpu-v5p
    lvlm plan ~/checkpoints/qwen --devices 64 --fsdp 64 --batch 64 --objective sft --full --remat
    lvlm plan 7b 13b 34b 72b --table --device h100 > tables.md

A model is a checkpoint folder, a config.json, or a published size (7b, 13b, 34b, 72b). The command compiles the
programs for that number of devices from shapes alone: nothing is allocated, and neither weights nor devices are needed.
It uses the compiler of TPUs or of NVIDIA GPUs if it is installed (pip install libtpu, or
"jax-cuda13-plugin[with-cuda]"), and otherwise the compiler of CPUs as a stand-in.
"""

import argparse
import datetime
import json
import pathlib
import sys

from lvlm_jax.cli import common
from lvlm_jax.errors import LVLMError
from lvlm_jax.files import write_whole
from lvlm_jax.methods import parse
from lvlm_jax.planning import compilers, devices, plan
from lvlm_jax.planning import report as plan_report
from lvlm_jax.planning.sizes import SIZES
from lvlm_jax.weights.load import DTYPES
from lvlm_jax.weights.quantize import QUANTS

COUNTS = (1, 8, 64, 512)  # numbers of devices in tables
TIMED = "h100"  # the device whose times a table shows, if none is named


def command_line(words: list[str]) -> argparse.Namespace:
    """The command line."""
    name = common.ahead(words, method="none").method
    epilog = f"published sizes: {', '.join(SIZES)}\n\nmethods and their settings:\n{parse.methods_help()}"
    parser = common.Parser(prog="lvlm plan", description=__doc__, epilog=epilog)
    add, count = parser.add_argument, common.number(int, 1)
    add("model", nargs="+", help="folder, config.json or published size; several with --table")
    add("--devices", type=count, metavar="N", help="number of devices (default: the product of the mesh's sizes)")
    for axis in ("data", "fsdp", "tensor"):
        add(
            f"--{axis}",
            type=int,
            metavar="N",
            help=f"size of the mesh's axis {axis}; -1 (for one axis): all remaining devices",
        )
    add("--dtype", choices=DTYPES, default="bfloat16", help="dtype of weights and products (default bfloat16)")
    add("--quant", choices=QUANTS, help="quantization of the decoder's weights; in training, only with adapters")
    add("--batch", type=count, default=1, metavar="N",
        help="number of conversations, or of pairs per update; in tables per group of devices (default 1)")  # fmt: skip
    add("--images", type=common.number(int, 0), default=1, metavar="N", help="images per conversation (default 1)")
    add(
        "--prompt-tokens",
        type=count,
        metavar="N",
        help="prompt tokens per conversation, image tokens included (default: image tokens plus 48)",
    )
    add("--new-tokens", type=count, default=128, metavar="N", help="longest answer (default 128)")
    add("--method", default="none", metavar="NAME", help="method of inference, or to train under (default none)")
    add("--objective", default="infer", metavar="NAME",
        help=f"infer, or for training: {', '.join(plan.RECIPES)} (default infer)")  # fmt: skip
    add("--full", action="store_true", help="train the parameters themselves instead of adapters")
    add(
        "--train",
        default=plan.Training("sft").train,
        metavar="REGEX",
        help="regular expression for these parameters (default %(default)s)",
    )
    add("--rank", type=count, default=16, metavar="N", help="rank of adapters (default 16)")
    add("--master", choices=("float32", "bfloat16"), default="float32",
        help="dtype of trained parameters and of the optimizer's moments (default float32)")  # fmt: skip
    add("--accumulate", type=count, default=1, metavar="N", help="gradient-accumulation steps per update (default 1)")
    add("--remat", action=argparse.BooleanOptionalAction,
        help="recompute layers in the backward pass (default for a billion parameters and more)")  # fmt: skip
    add("--device", action="append", metavar="NAME",
        help="device to compare the plan with, may be repeated: " + ", ".join(one.name for one in devices.DEVICES)
        + ", cpu (this machine, measured), or your own as NAME=GiB,GB/s,TFLOP/s (default: all)")  # fmt: skip
    add(
        "--compiler",
        choices=(compilers.AUTO, *compilers.NAMES, compilers.STAND_IN),
        default=compilers.AUTO,
        help="tpu, cuda, none (the stand-in), or auto: the one of --device if it is installed (default auto)",
    )
    add("--exact", action="store_true", help="compile all layers instead of two and three; takes minutes")
    add(
        "--table", action="store_true", help="Markdown tables, for each model on 1, 8, 64 and 512 devices (or --counts)"
    )
    add("--counts", metavar="N,N", help="numbers of devices in the table")
    add("--out", type=pathlib.Path, metavar="FILE", help="also write the plans as JSON to this file")
    common.method_flags(parser, name)
    arguments = parser.parse_args(words)
    arguments.method = parse.build_method(name, arguments)
    if len(arguments.model) > 1 and not arguments.table:
        raise LVLMError(f"{len(arguments.model)} models were given; expected one, or --table")
    arguments.counts = _counts(arguments.counts)
    return arguments


def job_of(arguments: argparse.Namespace, model: str) -> plan.Job:
    """The job that the command line describes, for one of its models."""
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
    names = arguments.device or _fitting(arguments.compiler)
    native = any(name.lower() == devices.CPU for name in names)
    if native and (len(names) > 1 or arguments.compiler in compilers.NAMES):
        raise LVLMError("programs for this CPU differ from those for accelerators; plan for --device cpu alone")
    jobs = [job_of(arguments, model) for model in arguments.model]
    if arguments.table:
        jobs = [plan_report.spread(job, count, arguments.batch) for job in jobs for count in arguments.counts]
    max_devices = max(job.devices for job in jobs)
    target = compilers.HERE
    if not native:
        targets = [devices.find(name) for name in names]
        target = compilers.chosen(arguments.compiler, [device.kind for device in targets])
    plan.simulate(1 if target in compilers.NAMES else max_devices)
    if native:
        targets = [devices.find(devices.CPU, max_devices)]
    plans = []
    for number, job in enumerate(jobs, 1):
        if arguments.table:
            print(f"{number} of {len(jobs)}: {job.name} on {job.devices}", file=sys.stderr, flush=True)
        plans.append(plan.plan(job, target, arguments.exact))
    if arguments.table:
        timed = targets[0] if arguments.device else devices.find(TIMED)
        print(plan_report.table(plans, timed, targets), end="")
    else:
        print(plan_report.text(plans[0], targets), end="")
    if arguments.out:
        result = {"command": "lvlm plan " + " ".join(words), "date": datetime.date.today().isoformat()}
        result["plans"] = [plan_report.record(one, targets) for one in plans]
        write_whole(arguments.out, json.dumps(result, indent=2) + "\n")
    return 0


def _fitting(compiler: str) -> list[str]:
    """The known devices that a compiler compiles for; all for the stand-in."""
    return [one.name for one in devices.DEVICES if compiler not in compilers.NAMES or one.kind == compiler]


def _mesh(arguments: argparse.Namespace) -> tuple[int, tuple[int, int, int]]:
    """The number of devices, and the mesh's sizes, of which one may be -1: the remaining devices.

    If the number of devices is given and no size is -1, the last axis without a size gets -1; the others get 1.
    """
    sizes = [arguments.data, arguments.fsdp, arguments.tensor]
    count = arguments.devices
    if count is None:
        known_sizes = [1 if size is None else size for size in sizes]
        if min(known_sizes) < 1:
            raise LVLMError("an axis of the mesh takes the rest (-1); give the number of --devices")
        return known_sizes[0] * known_sizes[1] * known_sizes[2], tuple(known_sizes)
    if None in sizes and -1 not in sizes:
        last = max(i for i in range(3) if sizes[i] is None)
        sizes[last] = -1
    return count, tuple(1 if size is None else size for size in sizes)


def _counts(text: str | None) -> tuple[int, ...]:
    if text is None:
        return COUNTS
    numbers = [part for part in text.split(",") if part]
    if not numbers or not all(part.isdecimal() and len(part) < 10 and int(part) for part in numbers):
        raise LVLMError(f"--counts is {text!r}; expected numbers of devices such as 1,8,64")
    return tuple(int(part) for part in numbers)
