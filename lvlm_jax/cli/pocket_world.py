"""Write a split of the pocket world in the layout of real data: images, COCO annotations, POPE, MME and other
questions.

    lvlm pocket-world --out runs/pocket_test --split test --images 500

The same seed always gives the same split. `--sample FILE` writes the demo's image instead (scene `splits.SAMPLE`).
"""

from PIL import Image

from lvlm_jax.cli import common
from lvlm_jax.errors import LVLMError
from lvlm_jax.pocket import scenes, splits


def main(arguments: list[str]) -> int:
    """Writes the split or the demo's image, and reports it."""
    parser = common.Parser(prog="lvlm pocket-world", description=__doc__)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", metavar="DIR", help="new or empty folder for a split")
    target.add_argument("--sample", metavar="FILE", help="write only the demo's image (PNG)")
    parser.add_argument("--split", default="test", help=f"{', '.join(scenes.SPLITS)} (default test)")
    parser.add_argument(
        "--images", type=common.number(int, 1), default=500, metavar="N", help="number of images (default 500)"
    )
    parser.add_argument(
        "--seed", type=common.number(int, 0), default=0, metavar="N", help="seed of the scenes (default 0)"
    )
    flags = parser.parse_args(arguments)
    if flags.sample:
        try:
            Image.fromarray(scenes.render(splits.demo_scene())).save(flags.sample)
        except (OSError, ValueError) as error:
            raise LVLMError(f"cannot write the picture {flags.sample!r}: {error}") from error
        return 0
    summary = splits.write_split(flags.out, flags.split, flags.images, flags.seed)
    for name, count in summary.items():
        print(f"{name:20} {count}")
    return 0
