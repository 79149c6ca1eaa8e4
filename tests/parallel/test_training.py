"""Training spread over eight simulated devices learns what it learns on one; and how processes find one another."""

import jax
import numpy as np
import pytest

from lvlm_jax import parallel
from lvlm_jax.errors import LVLMError
from tests.parallel import small_run
from tests.parallel.simulated import in_a_process

SHARDS = {"8,1,1": [16, 32], "1,8,1": [2, 32], "2,2,2": [8, 16]}


def test_every_mesh_learns_what_one_device_learns(tmp_path):
    small_run.train(None, tmp_path / "alone")
    expected = small_run.losses(tmp_path / "alone")
    assert len(expected) == 20 and expected[-1] < 0.9 * expected[0]
    (found,) = in_a_process("parallel.train_on_meshes", tmp_path / "meshes", count=8, quick=True)
    assert found["shards"] == SHARDS  # where the table puts them
    for mesh in SHARDS:
        np.testing.assert_allclose(found["losses"][mesh], expected, rtol=0, atol=1e-4, err_msg=mesh)
    # A checkpoint goes on on another mesh: ten steps on (1, 8, 1), the others on (2, 2, 2).
    moved, stayed = (np.array(found["losses"][name]) for name in ("moved", "1,8,1"))
    np.testing.assert_array_equal(moved[:10], stayed[:10])
    np.testing.assert_allclose(moved, stayed, rtol=0, atol=1e-4)
    assert not np.array_equal(moved[10:], stayed[10:])  # other sums, other rounding: it did train there


@pytest.mark.slow
def test_a_model_learns_on_every_mesh_what_it_learns_on_one_device(checkpoint, tmp_path):
    (found,) = in_a_process("parallel.train_on_meshes", tmp_path, checkpoint, count=8, quick=True)
    for mesh in SHARDS:
        expected = found["losses"]["one device"]
        np.testing.assert_allclose(found["losses"][mesh], expected, rtol=0, atol=1e-4, err_msg=mesh)


@pytest.mark.parametrize(
    ("variables", "several"),
    [
        ({}, False),
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "4"}, True),
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1"}, True),
    ],
    ids=str,
)
def test_several_processes_are_seen_in_the_environment(monkeypatch, variables, several):
    for name in ("SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert parallel.processes.several() is several
    if not several:
        assert parallel.start() is False and jax.process_count() == 1


def test_who_cannot_be_joined_is_said_in_one_line(monkeypatch):
    def nobody(**given):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nobody)
    with pytest.raises(LVLMError, match="cannot be joined .*JAX_COORDINATOR_ADDRESS"):
        parallel.start(True)
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(LVLMError, match="JAX_PROCESS_ID is 'first'; expected a number"):
        parallel.start(True)
