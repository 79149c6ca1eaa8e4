"""Run by `test_hosts` in each of several processes: `tools/evaluate.py`, with its arguments."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import evaluate

from lvlm_jax import cli

if __name__ == "__main__":
    cli.run(evaluate.main)
