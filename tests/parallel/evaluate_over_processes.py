"""Run by `test_hosts` in each of several processes: `tools/evaluate.py`, with its arguments."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import evaluate

from lvlm_jax.cli import common

if __name__ == "__main__":
    common.run(evaluate.main)
