"""Run experiments about training on the pocket model, from the data to the page; each stage runs once.

    lvlm pocket-training --out runs/pocket_training                  both parts, many hours on two cores
    lvlm pocket-training --parts flow --out runs/flow                flow alignment alone, about half an hour
    lvlm pocket-training --steps 20 --images 40 --captions 40 --config.gate=0 --out runs/short
    lvlm pocket-training --markdown docs/pocket_training.md          also write the page there

capl: trains a base that needs CAPL's cross-image attention; its accuracy must fall under truncated attention
(--config.gate). From this base, SFT, DPO, CAPL's pairs alone, its attention alone, and CAPL are trained with equal
prompts, steps and λ, for three seeds; then CAPL with λ = 0, and further rounds on its own answers. All models answer
balanced questions over several images; the table has accuracies, margins and a blind constant.
flow: trains SEVI's effect into the weights by flow alignment, and measures POPE and CHAIR.

Settings are in configs/pocket_training.py, and any of them may be set as --config.preference.steps=100.

    OUT/talks/, base/                      conversations, and the base that is trained on them
    OUT/pairs/                             prompts, answers and pairs
    OUT/arms/ARM-SEED/, rounds/            work folders of lvlm train: logs, checkpoints, adapter, export
    OUT/prompts/, flow_alignment/          prompts and work folder of flow alignment
    OUT/benchmark/                         answers and scores
    OUT/table.md                           the page: tables, and the comparisons in words

A stopped or killed run resumes when it is started again.
"""

import functools
from pathlib import Path

from absl import logging

from lvlm_jax import LVLM
from lvlm_jax.cli import common
from lvlm_jax.evaluation import statistics
from lvlm_jax.files import write_whole
from lvlm_jax.pocket import experiment, experiment_report, training, training_report
from lvlm_jax.pocket.stages import Setup
from lvlm_jax.training import settings

SETTINGS = "pocket_training"
PARTS = ("capl", "flow")
RECIPES = {"capl": ("base", "sft", "preference"), "flow": (training.RECIPE,)}


def page(setup: Setup, parts: list[str], command: str) -> str:
    """Runs the missing stages of some parts; returns the page with the results."""
    load = functools.lru_cache(maxsize=2)(lambda path: LVLM.from_pretrained(path, dtype="auto"))
    sections = []
    if PARTS[0] in parts:
        scores = experiment.run(setup, load)
        sections.append(experiment_report.section(scores, experiment.seeds(setup, scores), setup.resamples))
    if PARTS[1] in parts:
        sections.append(training_report.section(*training.run(setup, load)))
    return training_report.document(setup.config, setup.base, command, setup.seconds, sections)


def main(arguments: list[str]) -> int:
    """Runs all missing stages, and writes the page."""
    parser = common.Parser(prog="lvlm pocket-training", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/pocket_training"), metavar="DIR",
                        help="folder for all files (default runs/pocket_training)")  # fmt: skip
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="experiments to run (default both)"
    )
    parser.add_argument("--steps", type=common.number(int, 1), metavar="N",
                        help="steps of every training (default: from the settings)")  # fmt: skip
    parser.add_argument("--images", type=common.number(int, 10), default=200, metavar="N",
                        help="flow: test images to ask about (default 200)")  # fmt: skip
    parser.add_argument("--captions", type=common.number(int, 10), default=200, metavar="N",
                        help="flow: test images to describe (default 200)")  # fmt: skip
    parser.add_argument("--batch-size", type=common.number(int, 1), default=64, metavar="N",
                        help="batch size (default 64)")  # fmt: skip
    parser.add_argument("--resamples", type=common.number(int, 1), default=statistics.RESAMPLES, metavar="N",
                        help=f"bootstrap resamples (default {statistics.RESAMPLES})")  # fmt: skip
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the page to this file")
    flags, changes = parser.parse_known_args(arguments)
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    config = settings.read(SETTINGS, changes)
    for part in flags.parts:
        for recipe in RECIPES[part]:
            config[recipe].steps = flags.steps or config[recipe].steps
            settings.check(config[recipe])
    setup = Setup(config, flags.out, flags.batch_size, flags.resamples, flags.images, flags.captions)
    text = page(setup, flags.parts, " ".join(["lvlm pocket-training", *arguments]))
    write_whole(flags.out / "table.md", text)
    if flags.markdown:
        write_whole(flags.markdown, text)
    print(text)
    print(f"page in {flags.out / 'table.md'}")
    return 0
