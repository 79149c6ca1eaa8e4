"""Run by `test_kill` in a process of its own: trains the line, slowly enough to be killed anywhere.

Arguments: work folder, seconds that each batch takes, processes that make batches.
"""

import functools
import sys
import time
from pathlib import Path

from tests.training import line

STEPS = 80


def slowly(step, seconds):
    time.sleep(seconds)
    return line.source(step)


def train(workdir, seconds, workers):
    changes = dict(steps=STEPS, log_every=1, save_every=3, evaluate_every=20)
    line.train(line.task(functools.partial(slowly, seconds=seconds)), workdir, workers=workers, **changes)


if __name__ == "__main__":
    train(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
