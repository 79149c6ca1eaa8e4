"""Processes that make batches: the same ones in order, errors that reach the caller, signals that they leave alone."""

import os
import signal

import numpy as np
import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.training.data import workers
from tests.training import line


def test_worker_processes_make_the_same_batches_in_order():
    made = list(workers.batches(line.source, start=4, stop=9, workers=2))
    assert len(made) == 5
    for step, batch in enumerate(made, 4):
        np.testing.assert_equal(batch, line.source(step))
    assert not np.array_equal(made[0]["inputs"], made[1]["inputs"])


def failing(step):
    raise ValueError(f"no batch {step}")


def test_an_error_in_a_worker_reaches_the_caller():
    with pytest.raises(ValueError, match="no batch 0"):
        list(workers.batches(failing, 0, 3, workers=1))


def killed(step):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_named():
    with pytest.raises(LVLMError, match="a process that makes batches has ended .* lower loop.workers"):
        list(workers.batches(killed, 0, 3, workers=1))


def asked_to_stop(step):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    return step


def test_workers_leave_it_to_the_training_process_to_stop():
    assert list(workers.batches(asked_to_stop, 3, 6, workers=1)) == [3, 4, 5]
