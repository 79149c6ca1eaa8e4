"""Run the training recipes on the pocket world, from making the data to measuring the effect on the pocket benchmark.

    lvlm pocket-training --out runs/pocket_training                  about an hour on two quiet cores
    lvlm pocket-training --steps 20 --images 40 --captions 40 --out runs/short
    lvlm pocket-training --markdown docs/pocket_training.md          also write the tables there

CAPL learns on pairs with rejected answers from truncated attention; DPO, the paper's ablation, on pairs with rejected
answers from the unmodified model; chosen answers are the truth in both. Flow alignment puts SEVI's effect into the
weights. Settings are in configs/pocket_training.py, and any of them may be set as --config.dpo.steps=100.

    OUT/prompts/, OUT/pairs/               prompts, and pairs from lvlm preferences, for training and held out
    OUT/capl/, dpo/, flow_alignment/       work folders of lvlm train: logs, checkpoints, adapter, export
    OUT/benchmark/PART/MODEL/              answers and scores OUT/table.md                           the tables, and
    conclusions in words

A stopped or killed run resumes when it is started again.
"""

from pathlib import Path

from absl import logging

from lvlm_jax.cli import common
from lvlm_jax.evaluation import statistics
from lvlm_jax.files import write_whole
from lvlm_jax.pocket import training
from lvlm_jax.training import settings

SETTINGS = "pocket_training"


def main(arguments: list[str]) -> int:
    """Runs all missing stages, and writes the tables."""
    parser = common.Parser(prog="lvlm pocket-training", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/pocket_training"), metavar="DIR",
                        help="folder for all files (default runs/pocket_training)")  # fmt: skip
    parser.add_argument("--steps", type=common.number(int, 1), metavar="N",
                        help="steps of every training (default: from the settings)")  # fmt: skip
    parser.add_argument("--images", type=common.number(int, 10), default=200, metavar="N",
                        help="test images to ask about (default 200)")  # fmt: skip
    parser.add_argument("--captions", type=common.number(int, 10), default=200, metavar="N",
                        help="test images to describe (default 200)")  # fmt: skip
    parser.add_argument("--batch-size", type=common.number(int, 1), default=64, metavar="N",
                        help="batch size (default 64)")  # fmt: skip
    parser.add_argument("--resamples", type=common.number(int, 1), default=statistics.RESAMPLES, metavar="N",
                        help=f"bootstrap resamples (default {statistics.RESAMPLES})")  # fmt: skip
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables to this file")
    flags, changes = parser.parse_known_args(arguments)
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    config = settings.read(SETTINGS, changes)
    if flags.steps:
        for recipe in training.RECIPES:
            config[recipe].steps = flags.steps
    for recipe in training.RECIPES:
        settings.check(config[recipe])
    setup = training.Setup(config, flags.out, flags.batch_size, flags.resamples, flags.images, flags.captions)
    text = training.run(setup, " ".join(["lvlm pocket-training", *arguments]))
    write_whole(flags.out / "table.md", text)
    if flags.markdown:
        write_whole(flags.markdown, text)
    print(text)
    print(f"tables in {flags.out / 'table.md'}")
    return 0
