"""Every method on meshes of eight simulated devices gives what it gives on one."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from lvlm_jax import methods

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_every_method_on_a_mesh_equals_one_device(tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(ROOT),
    }
    script = ROOT / "tests" / "parallel" / "methods_on_meshes.py"
    command = [sys.executable, str(script), str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 2 * (1 + len(methods.names()))
    assert {name: error for name, (error, count) in errors.items() if not (error <= 1e-4 and count)} == {}
