"""Train a model: `python train.py --config configs/pocket.py --workdir runs/pocket`.

Started again with the same work folder, it goes on from its newest checkpoint.
"""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from lvlm_jax.compilation import enable_cache
from lvlm_jax.errors import LVLMError
from lvlm_jax.training import pocket

CONFIG = config_flags.DEFINE_config_file("config", None, "What to train, a file of configs/; required.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of checkpoints and logs; required.")
RECIPES = {"pocket": pocket.train}


def main(words: list[str]) -> None:
    """Trains as the flags say; a known fault is one line on stderr and exit code 2."""
    del words
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it writes
    try:
        recipe = CONFIG.value.recipe
        if recipe not in RECIPES:
            raise LVLMError(f"recipe {recipe!r} is unknown; expected one of {', '.join(RECIPES)}")
        enable_cache()
        folder = RECIPES[recipe](CONFIG.value, Path(WORKDIR.value))
    except LVLMError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"checkpoint written to {folder}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
