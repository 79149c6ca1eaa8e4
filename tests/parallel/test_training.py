"""Training spread over eight simulated devices, or over two processes, learns what it learns on one device."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from lvlm_jax import parallel
from tests.parallel import small_run

pytestmark = pytest.mark.full_compiler  # what other processes learn

ROOT = pathlib.Path(__file__).parents[2]


def begin(script, *words, **variables):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | variables
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.parallel.{script}", *map(str, words)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """What the process prints."""
    printed, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return printed


def on_eight_devices(*words):
    flags = "--xla_force_host_platform_device_count=8"
    return json.loads(finish(begin("train_on_meshes", *words, XLA_FLAGS=flags)))


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """What `train_on_meshes` prints for the miniature."""
    return on_eight_devices(tmp_path_factory.mktemp("meshes"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(losses, trained parameters) on one device."""
    workdir = tmp_path_factory.mktemp("alone")
    trained = small_run.train(None, workdir)
    return small_run.losses(workdir), trained


@pytest.mark.parametrize("mesh", ["8,1,1", "1,8,1", "2,2,2"])
def test_every_mesh_learns_what_one_device_learns(eight, alone, mesh):
    expected = alone[0]
    assert len(expected) == 20 and expected[-1] < 0.9 * expected[0]
    np.testing.assert_allclose(eight["losses"][mesh], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("mesh", "shard"), [("8,1,1", [16, 32]), ("1,8,1", [2, 32]), ("2,2,2", [8, 16])], ids=str)
def test_parameters_are_trained_where_the_table_puts_them(eight, mesh, shard):
    assert eight["shards"][mesh] == shard


def test_a_checkpoint_goes_on_on_another_mesh(eight):
    """Ten steps on (1, 8, 1), the others on (2, 2, 2)."""
    moved, stayed = (np.array(eight["losses"][name]) for name in ("moved", "1,8,1"))
    np.testing.assert_array_equal(moved[:10], stayed[:10])
    np.testing.assert_allclose(moved, stayed, rtol=0, atol=1e-4)
    assert not np.array_equal(moved[10:], stayed[10:])  # other sums, other rounding: it did train there


@pytest.mark.slow
def test_a_model_learns_on_every_mesh_what_it_learns_on_one_device(checkpoint, tmp_path):
    found = on_eight_devices(tmp_path, checkpoint)["losses"]
    for mesh in ("8,1,1", "1,8,1", "2,2,2"):
        np.testing.assert_allclose(found[mesh], found["one device"], rtol=0, atol=1e-4, err_msg=mesh)


def two_processes(workdir, stop_in=-1):
    """Trains in two processes; process 1 may be asked to stop."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    both = [begin("one_of_two", workdir, stop_in, **variables, JAX_PROCESS_ID=str(i)) for i in range(2)]
    for process in both:
        finish(process)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(alone, tmp_path):
    """Their checkpoint is then read by one process."""
    losses, trained = alone
    two_processes(tmp_path)
    np.testing.assert_allclose(small_run.losses(tmp_path), losses, rtol=0, atol=1e-5)
    kernel = np.load(tmp_path / "kernel.npy")
    np.testing.assert_allclose(kernel, trained["language_model"]["lm_head"]["kernel"], rtol=0, atol=1e-5)
    again = small_run.train(None, tmp_path)
    np.testing.assert_array_equal(again["language_model"]["lm_head"]["kernel"], kernel)


@pytest.mark.slow
def test_two_processes_stop_together_when_one_is_asked_to(alone, tmp_path):
    two_processes(tmp_path, stop_in=7)
    stopped = small_run.losses(tmp_path)
    assert 8 <= len(stopped) < 20 and (tmp_path / "talk" / str(len(stopped))).is_dir()
    two_processes(tmp_path)
    np.testing.assert_allclose(small_run.losses(tmp_path), alone[0], rtol=0, atol=1e-5)


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


def test_nobody_to_join_is_one_line(monkeypatch):
    def nobody(**given):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nobody)
    with pytest.raises(parallel.processes.LVLMError, match="cannot be joined .*JAX_COORDINATOR_ADDRESS"):
        parallel.start(True)


def test_a_process_number_that_is_none(monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(parallel.processes.LVLMError, match="JAX_PROCESS_ID is 'first'; expected a number"):
        parallel.start(True)
