"""Write a split of the pocket world the way real data comes: images, COCO annotations, POPE, MME and other questions.

    lvlm pocket-world --out runs/pocket_test --split test --images 500

A split with the same seed is the same every time. `--sample FILE` writes the demo's image instead, which is
scene `splits.SAMPLE`.
"""

from PIL import Image

from lvlm_jax.cli import common
from lvlm_jax.errors import LVLMError
from lvlm_jax.pocket import scenes, splits


def main(arguments: list[str]) -> int:
    """Write the split, or the demo's image, that the arguments ask for, and say what was written."""
    parser = common.Parser(prog="lvlm pocket-world", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", metavar="DIR", help="new or empty folder for a split")
    what.add_argument("--sample", metavar="FILE", help="write only the demo's image (PNG)")
    parser.add_argument("--split", default="test", help=f"{', '.join(scenes.SPLITS)} (default test)")
    parser.add_argument("--images", type=common.number(int, 1), default=500, metavar="N", help="how many (default 500)")
    parser.add_argument("--seed", type=common.number(int, 0), default=0, metavar="N", help="of all scenes (default 0)")
    flags = parser.parse_args(arguments)
    if flags.sample:
        try:
            Image.fromarray(scenes.render(splits.demo_scene())).save(flags.sample)
        except (OSError, ValueError) as error:
            raise LVLMError(f"cannot write the picture {flags.sample!r}: {error}") from error
        return 0
    written = splits.write_split(flags.out, flags.split, flags.images, flags.seed)
    for name, count in written.items():
        print(f"{name:20} {count}")
    return 0
