"""Every method on meshes of eight simulated devices gives what it gives on one; and every family on two."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from lvlm_jax import methods
from tests.models import zoo

ROOT = pathlib.Path(__file__).parents[2]


def in_a_process(script: str, devices: int, folder: pathlib.Path) -> dict:
    """What a script of this folder prints on so many simulated devices."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", f"tests.parallel.{script}", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_method_on_a_mesh_equals_one_device(tmp_path):
    errors = in_a_process("methods_on_meshes", 8, tmp_path / "model")
    assert len(errors) == 2 * (1 + len(methods.names()))
    assert {name: error for name, (error, count) in errors.items() if not (error <= 1e-4 and count)} == {}


@pytest.mark.slow
def test_every_family_on_a_mesh_equals_one_device(tmp_path):
    errors = in_a_process("families_on_a_mesh", 2, tmp_path)
    assert set(errors) == set(zoo.FAMILIES)
    assert {name: error for name, error in errors.items() if not error <= 1e-4} == {}
