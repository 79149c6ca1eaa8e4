"""Every method on every benchmark of the pocket world, with intervals, differences to greedy, and controls.

    python tools/pocket_benchmark.py                                          all methods, 200 images
    python tools/pocket_benchmark.py --images 60                              fewer to ask about, 200 to describe
    python tools/pocket_benchmark.py --methods vcd sevi-focused --images 100
    python tools/pocket_benchmark.py --markdown docs/pocket_benchmark.md      also write the tables there

Settings of the methods are in configs/pocket_benchmark.py. OUT/BENCHMARK/METHOD holds answers and scores, and the
controls lie beside them; stopped and started again, it goes on where it was. OUT/table.md has the tables.
"""

import datetime
import importlib.util
import os
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

import jax

from lvlm_jax import LVLM, __version__, files
from lvlm_jax.cli import common
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import get, statistics
from lvlm_jax.evaluation.run import Options, Run
from lvlm_jax.journal.record import checkpoint_hash
from lvlm_jax.pocket import benchmark as pocket
from lvlm_jax.weights import names

SETTINGS = Path(__file__).resolve().parents[1] / "configs" / "pocket_benchmark.py"
NOTES = """\
Shares are in per cent, with 95 % bootstrap intervals (images resampled); below them the difference to greedy with its
paired interval. Seconds are those of answering, programs compiled included. A method "beats" a control where the
paired interval of the difference lies on the better side of 0, "does not beat" it where it lies on the worse one, and
"cannot be told from" it otherwise. The controls are explained in `lvlm_jax/evaluation/controls.py`."""


def settings(wanted: list[str]) -> dict:
    """Name -> method, of configs/pocket_benchmark.py.

    Raises:
        LVLMError: a wanted method is not there.
    """
    spec = importlib.util.spec_from_file_location("pocket_benchmark_settings", SETTINGS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    known = module.get_methods()
    if wanted == ["all"]:
        return known
    unknown = [name for name in wanted if name.lower() not in known]
    if unknown:
        raise LVLMError(f"{SETTINGS.name} has no method {unknown[0]!r}; it has all, {', '.join(known)}")
    return {name.lower(): known[name.lower()] for name in wanted}


def document(flags, found: dict[str, dict], path: str) -> str:
    """The tables, with what they were made by and of."""
    chosen = "" if flags.methods == ["all"] else f" --methods {' '.join(flags.methods)}"
    about = (
        f"{datetime.date.today().isoformat()}, {os.cpu_count()} x {platform.processor() or platform.machine()}, "
        f"{jax.devices()[0].device_kind}, Python {platform.python_version()}, jax {jax.__version__}, "
        f"lvlm_jax {__version__}, model {Path(path).name} {checkpoint_hash(path)[:12]}, {flags.images} images to ask "
        f"about, {flags.captions} to describe."
    )
    tables = [pocket.markdown(part, found[part.name]) for part in pocket.PARTS if found[part.name]]
    return "\n".join(
        [
            "# Pocket benchmark",
            "",
            f"    python tools/pocket_benchmark.py --images {flags.images} --captions {flags.captions}{chosen}",
            "",
            about,
            "",
            NOTES,
            "",
            *tables,
        ]
    )


def main(arguments: list[str]) -> int:
    """Run what is missing, and write the tables after every method."""
    parser = common.Parser(prog="pocket_benchmark.py", description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["all"], metavar="NAME",
                        help="all, or names from configs/pocket_benchmark.py (default all)")  # fmt: skip
    parser.add_argument(
        "--images", type=common.number(int, 1), default=200, metavar="N", help="test images (default 200)"
    )
    parser.add_argument("--captions", type=common.number(int, 1), default=200, metavar="N",
                        help="test images to describe (default 200)")  # fmt: skip
    parser.add_argument("--model-path", "--model", default="pocket", metavar="PATH",
                        help="another checkpoint trained on the pocket world (default the one inside)")  # fmt: skip
    parser.add_argument(
        "--batch-size",
        type=common.number(int, 1),
        default=64,
        metavar="N",
        help="prompts at once (default 64)",
    )
    parser.add_argument("--resamples", type=common.number(int, 1), default=statistics.RESAMPLES, metavar="N",
                        help=f"bootstrap resamples (default {statistics.RESAMPLES})")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/pocket_benchmark"), metavar="DIR",
                        help="world, answers, scores and tables (default runs/pocket_benchmark)")  # fmt: skip
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here too")
    flags = parser.parse_args(arguments)
    began = time.monotonic()
    chosen = settings(flags.methods)
    worlds = {
        part.name: flags.captions if part.benchmark.descriptions else flags.images for part in pocket.PARTS
    }
    for count in set(worlds.values()):
        pocket.write_world(flags.out / f"world-{count}", count)
    path = names.checkpoint(flags.model_path)
    dtype = names.dtype("auto")
    model = LVLM.from_pretrained(path, dtype=dtype)
    found: dict[str, dict] = {part.name: {} for part in pocket.PARTS}
    for name, method in {"greedy": None, **chosen}.items():
        jax.clear_caches()  # the programs of all methods together are gigabytes
        for part in pocket.PARTS:
            folder = flags.out / part.name
            options = Options(
                flags.batch_size, controls=folder if method is not None else None, resamples=flags.resamples
            )
            # The greedy control is the greedy row itself: both have the same log.
            world = flags.out / f"world-{worlds[part.name]}"
            run = Run(path, dtype, get(part.protocol), part.data(world), folder / name, method, options)
            run.ask(model)
            found[part.name][name] = run.score()
            text = document(flags, found, path)
            files.write_whole(flags.out / "table.md", text)
    if flags.markdown:
        files.write_whole(flags.markdown, text)
    print(text)
    print(f"{time.monotonic() - began:.0f} s; tables in {flags.out / 'table.md'}")
    return 0


if __name__ == "__main__":
    common.run(main)
