"""Processes that make batches: the same ones in order, errors that reach the caller, signals that they leave alone."""

import os
import signal

import numpy as np
import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.training.data import workers
from tests.training import line


def asked_to_stop(step):
    """A batch; stopping is left to the training process."""
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    return line.source(step)


def test_worker_processes_make_the_same_batches_in_order():
    made = list(workers.batches(asked_to_stop, start=4, stop=9, workers=2))
    assert len(made) == 5
    for step, batch in enumerate(made, 4):
        np.testing.assert_equal(batch, line.source(step))


def failing(step):
    raise ValueError(f"no batch {step}")


def killed(step):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (failing, ValueError, "no batch 0"),
        (killed, LVLMError, "a process that makes batches has ended .* lower loop.workers"),
    ],
)
def test_an_error_in_a_worker_and_its_end_reach_the_caller(source, error, message):
    with pytest.raises(error, match=message):
        list(workers.batches(source, 0, 3, workers=1))
