"""Measure the abilities of a pocket checkpoint by greedy answers on the test split: POPE, captions, forced choice, ...

    lvlm pocket-report --model pocket --images 300 --out runs/pocket_report

Writes `report.json` and `report.md` (figures with 95 % bootstrap intervals, images resampled).
"""

import datetime
import json
import time
from pathlib import Path

from lvlm_jax import LVLM
from lvlm_jax.cli import common
from lvlm_jax.files import write_whole
from lvlm_jax.pocket import report
from lvlm_jax.weights import names


def main(arguments: list[str]) -> int:
    """Evaluates the checkpoint and writes the report."""
    parser = common.Parser(prog="lvlm pocket-report", description=__doc__)
    parser.add_argument("--model-path", "--model", default="pocket", metavar="PATH",
                        help="smol, or a checkpoint folder (default: the pocket model)")  # fmt: skip
    parser.add_argument(
        "--dtype",
        choices=names.NUMBER_TYPES,
        default="float32",
        help="dtype of weights and products (default float32); bfloat16 is fast on CPUs with AMX",
    )
    parser.add_argument(
        "--images", type=common.number(int, 20), default=300, metavar="N", help="test images (default 300)"
    )
    parser.add_argument(
        "--batch-size", "--batch", type=common.number(int, 1), default=32, metavar="N", help="batch size (default 32)"
    )
    parser.add_argument(
        "--seed", type=common.number(int, 0), default=0, metavar="N", help="seed of the test split (default 0)"
    )
    parser.add_argument("--parts", nargs="+", choices=report.PARTS, default=list(report.PARTS), metavar="PART",
                        help=f"{', '.join(report.PARTS)} (default all)")  # fmt: skip
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/pocket_report"),
        metavar="DIR",
        help="folder for the report (default runs/pocket_report)",
    )
    flags = parser.parse_args(arguments)
    model = LVLM.from_pretrained(flags.model_path, dtype=flags.dtype)
    began = time.monotonic()
    figures = report.examine(model, flags.images, flags.batch_size, flags.seed, flags.parts)
    about = {
        "date": datetime.date.today().isoformat(),
        "images": flags.images,
        "seed": flags.seed,
        "dtype": names.dtype(flags.dtype),
        "seconds": round(time.monotonic() - began),
    }
    table = report.markdown(figures, about)
    write_whole(flags.out / "report.json", json.dumps({"about": about, "figures": figures}, indent=1))
    write_whole(flags.out / "report.md", table)
    print(table)
    return 0
