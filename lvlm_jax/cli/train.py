"""Train a model as a config says: an objective on data of yours, or the pocket model from scratch.

    lvlm train --config capl --config.data=pairs.jsonl --workdir runs/capl
    lvlm train --config mine.py --config.optimizer.peak=1e-4 --config.steps=200 --workdir runs/mine
    lvlm train --config flow_alignment --help

Every field of the config may be set on the command line, as in --config.optimizer.peak=1e-4. Started again with the
same work folder, it goes on from its newest checkpoint.

Several processes that SLURM, Open MPI or GKE has started join by themselves; elsewhere give each of them
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. When one of them is gone, LVLM_JAX_PEER_TIMEOUT seconds
(default 30) without a sign of life, the others end with exit code 134, to be started again; see docs/scaling.md.
"""

import ast
from pathlib import Path

from absl import logging

from lvlm_jax import config_files, parallel
from lvlm_jax.cli import common
from lvlm_jax.compilation import enable_cache
from lvlm_jax.methods import parse
from lvlm_jax.pocket import recipe as pocket
from lvlm_jax.pocket import smol_recipe
from lvlm_jax.training import finetune, registry, settings


def fields(name: str) -> str:
    """What a config says of itself, and its fields with their values.

    Raises:
        LVLMError: no such config, or one of an unknown recipe.
    """
    file = config_files.config_file(name)
    said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    described = settings.describe(config_files.load_config(name))
    lines = [f"config {name}: {said}", "", "its fields, each a flag --config.FIELD=VALUE, with their values:"]
    for field in described:
        start = f"  {field.name} = {field.default!r}"
        lines.append(f"{start:38}  {field.doc}".rstrip())
    return "\n".join(lines)


def main(words: list[str]) -> int:
    """Trains as the flags say."""
    registry.register(pocket.RECIPE)
    registry.register(smol_recipe.RECIPE)
    parser = common.Parser(prog="lvlm train", description=__doc__, add_help=False)
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME",
        help=f"what to train: {', '.join(sorted(registry.names()))}, or a file like theirs in configs/",
    )
    parser.add_argument(
        "--workdir", required=True, type=Path, metavar="DIR", help="folder of checkpoints, logs and the result"
    )
    parser.add_argument(
        "--distributed", action=parse.Switch, help="join other processes (default: if the environment has any)"
    )
    parser.add_argument(
        "-h",
        "--help",
        action="store_true",
        help="show this, with the fields of --config (without one: of capl), and stop",
    )
    if {"-h", "--help"}.intersection(words):
        print(f"{parser.format_help()}\n{fields(common.ahead(words, config='capl').config)}")
        return 0
    given, changes = parser.parse_known_args(words)
    # Orbax tells of every file it writes; what goes wrong there is said once, by `training.checkpoints`.
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    config = settings.read(given.config, changes)
    parallel.start(given.distributed)
    enable_cache()
    folder = finetune.train(config, given.workdir)
    print(f"{'checkpoint' if folder.is_dir() else 'result'} written to {folder}")
    return 0
