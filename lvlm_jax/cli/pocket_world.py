"""Write a split of the pocket world in the formats of real data: images, COCO annotations, POPE, MME, more questions.

    lvlm pocket-world --out runs/pocket_test --split test --images 500
    lvlm pocket-world --out runs/pocket_questions --balanced 2700

The same seed always gives the same split. `--balanced` writes questions over several images instead, with equally many
of each kind and of each answer, for the protocols `pocket/multi-image` and `pocket/question-first` of lvlm evaluate.
`--sample FILE` writes only the demo's image, which is scene `splits.SAMPLE`.
"""

from pathlib import Path

from PIL import Image

from lvlm_jax.cli import common
from lvlm_jax.errors import LVLMError
from lvlm_jax.pocket import balanced, scenes, splits
from lvlm_jax.pocket.splits import known_split


def main(arguments: list[str]) -> int:
    """Writes the split or the demo's image, and prints what was written."""
    parser = common.Parser(prog="lvlm pocket-world", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", metavar="DIR", help="new or empty folder for a split")
    what.add_argument("--sample", metavar="FILE", help="write only the demo's image (PNG)")
    parser.add_argument("--split", default="test", help=f"{', '.join(scenes.SPLITS)} (default test)")
    parser.add_argument(
        "--images", type=common.number(int, 1), default=500, metavar="N", help="number of images (default 500)"
    )
    parser.add_argument(
        "--seed", type=common.number(int, 0), default=0, metavar="N", help="seed of all scenes (default 0)"
    )
    parser.add_argument("--balanced", type=common.number(int, 1), metavar="N",
                        help="about this many balanced questions over several images")  # fmt: skip
    flags = parser.parse_args(arguments)
    if flags.sample:
        try:
            Image.fromarray(scenes.render(splits.demo_scene())).save(flags.sample)
        except (OSError, ValueError) as error:
            raise LVLMError(f"cannot write the image {flags.sample!r}: {error}") from error
        return 0
    if flags.balanced:
        count = balanced.write(flags.out, flags.balanced, flags.seed, known_split(flags.split))
        print(f"{count} questions in {Path(flags.out) / balanced.FILE}")
        return 0
    written = splits.write_split(flags.out, flags.split, flags.images, flags.seed)
    for name, count in written.items():
        print(f"{name:20} {count}")
    return 0
