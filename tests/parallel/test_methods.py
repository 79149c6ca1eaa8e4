"""Every method on meshes of eight simulated devices gives what it gives on one; and every family on two."""

import pytest

from lvlm_jax import methods
from tests.models import zoo
from tests.parallel.simulated import in_a_process


@pytest.mark.slow
def test_every_method_on_a_mesh_equals_one_device(tmp_path):
    (errors,) = in_a_process("parallel.on_meshes", "methods", tmp_path / "model", count=8)
    assert len(errors) == 2 * (1 + len(methods.names()))
    assert {name: error for name, (error, count) in errors.items() if not (error <= 1e-4 and count)} == {}


@pytest.mark.slow
def test_every_family_on_a_mesh_equals_one_device(tmp_path):
    (errors,) = in_a_process("parallel.on_meshes", "families", tmp_path, count=2)
    assert set(errors) == set(zoo.FAMILIES)
    assert {name: error for name, error in errors.items() if not error <= 1e-4} == {}
