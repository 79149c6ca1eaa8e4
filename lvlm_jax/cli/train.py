"""Train a model according to a config: an objective on your data, or the pocket model from scratch.

    lvlm train --config capl --config.data=pairs.jsonl --workdir runs/capl
    lvlm train --config mine.py --config.optimizer.peak=1e-4 --config.steps=200 --workdir runs/mine
    lvlm train --config flow_alignment --help

Every field of the config may be set on the command line, as in --config.optimizer.peak=1e-4. A run that is started
again with the same work folder resumes from its newest checkpoint.

Processes started by SLURM, Open MPI or GKE join by themselves; elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
and JAX_PROCESS_ID for each. If one of them gives no sign of life for LVLM_JAX_PEER_TIMEOUT seconds (default 30), the
others end with exit code 134 and can be started again; see docs/scaling.md.
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
    """The docstring of a config, and its fields with their values.

    Raises:
        LVLMError: there is no such config, or its recipe is unknown.
    """
    file = config_files.config_file(name)
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    described = settings.describe(config_files.load_config(name))
    lines = [f"config {name}: {docstring}", "", "its fields, each a flag --config.FIELD=VALUE, with their values:"]
    for field in described:
        start = f"  {field.name} = {field.default!r}"
        lines.append(f"{start:38}  {field.doc}".rstrip())
    return "\n".join(lines)


def main(words: list[str]) -> int:
    """Trains according to the flags."""
    registry.register(pocket.RECIPE)
    registry.register(smol_recipe.RECIPE)
    parser = common.Parser(prog="lvlm train", description=__doc__, add_help=False)
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME",
        help=f"what to train: {', '.join(sorted(registry.names()))}, or your own file like those in configs/",
    )
    parser.add_argument(
        "--workdir", required=True, type=Path, metavar="DIR", help="folder for checkpoints, logs and the result"
    )
    parser.add_argument(
        "--distributed",
        action=parse.Switch,
        help="join the other processes of the run (default: if the environment describes several)",
    )
    parser.add_argument(
        "-h", "--help", action="store_true", help="show this help, with the fields of --config (default capl), and exit"
    )
    if {"-h", "--help"}.intersection(words):
        print(f"{parser.format_help()}\n{fields(common.ahead(words, config='capl').config)}")
        return 0
    arguments, changes = parser.parse_known_args(words)
    # Orbax logs every file it writes; `training.checkpoints` reports its errors once.
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    config = settings.read(arguments.config, changes)
    parallel.start(arguments.distributed)
    enable_cache()
    folder = finetune.train(config, arguments.workdir)
    print(f"{'checkpoint' if folder.is_dir() else 'result'} written to {folder}")
    return 0
