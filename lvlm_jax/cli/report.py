"""Report all scores below a folder: methods by benchmarks, controls, categories, cost, and examples.

    lvlm report runs/
    lvlm report runs/ --out runs/report --images ~/coco/val2014 --title "LLaVA-1.5 on POPE and CHAIR"
    lvlm report runs/ --leaderboard leaderboard.md

Reads every scores.json of lvlm evaluate below the folder, with the answers and logs beside it. Writes index.html, one
page that needs no network, and report.md with the same tables. A method is compared with the same model without a
method if both answered the same questions under the same protocol. Figures from other question files, image lists or
parsers are marked and never subtracted. Examples are drawn with a seed; their images are looked up in --images and
shown small. --leaderboard writes one Markdown file instead: each run is a row with its figures, the commit and the
machine that answered, and the seconds.
"""

from pathlib import Path

from lvlm_jax.cli import common
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation.report import leaderboard
from lvlm_jax.evaluation.report import page as report


def main(arguments: list[str]) -> int:
    """Writes the report or the leaderboard."""
    parser = common.Parser(prog="lvlm report", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="DIR",
                        help="folder with the runs, at any depth (default runs)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the two files (default DIR/report)")
    parser.add_argument("--title", default=report.TITLE, metavar="TEXT", help="title of the page")
    parser.add_argument("--images", type=Path, action="append", default=[], metavar="DIR",
                        help="images of the examples, or the folder of a benchmark; may be repeated")  # fmt: skip
    parser.add_argument("--examples", type=common.number(int, 0), default=2, metavar="N",
                        help="number of fixed and of broken answers shown per method and protocol "
                        "(default 2)")  # fmt: skip
    parser.add_argument(
        "--seed", type=common.number(int, 0), default=0, metavar="N", help="seed for drawing examples (default 0)"
    )
    parser.add_argument("--leaderboard", type=Path, metavar="FILE",
                        help="write a leaderboard to this Markdown file, and no report")  # fmt: skip
    flags = parser.parse_args(arguments)
    if flags.leaderboard:
        if flags.out or flags.images:
            raise LVLMError("--leaderboard writes its own file and no report; leave --out and --images out")
        print(leaderboard.write(flags.folder, flags.leaderboard))
        return 0
    paths = report.write(
        flags.folder, flags.out or flags.folder / "report",
        title=flags.title, images=flags.images, each=flags.examples, seed=flags.seed,
    )  # fmt: skip
    sizes = (f"{path} ({path.stat().st_size / 1e6:.1f} MB)" for path in paths)
    print("\n".join(sizes))
    return 0
