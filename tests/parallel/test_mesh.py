"""A model spread over eight simulated devices gives what it gives on one."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.errors import LVLMError
from lvlm_jax.parallel import AXES, make_mesh

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def spread(checkpoint, mixed, tmp_path_factory):
    """(placements of parameters and images, results) from the process with eight devices."""
    folder = tmp_path_factory.mktemp("mesh")
    np.savez(folder / "inputs.npz", **mixed)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(ROOT),
    }
    script = ROOT / "tests" / "parallel" / "eight_devices.py"
    done = subprocess.run(
        [sys.executable, str(script), checkpoint, folder / "inputs.npz", folder / "results.npz"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), np.load(folder / "results.npz")


@pytest.mark.parametrize(
    ("path", "spec", "shard"),
    [
        ("language_model/embed_tokens/embedding", ["tensor", "fsdp"], [65, 24]),
        ("language_model/lm_head/kernel", ["fsdp", "tensor"], [24, 65]),
        ("language_model/layers_0/self_attn/q_proj/kernel", ["fsdp", "tensor"], [24, 12]),
        ("language_model/layers_1/self_attn/k_proj/kernel", ["fsdp", "tensor"], [24, 6]),
        ("language_model/layers_1/self_attn/o_proj/kernel", ["tensor", "fsdp"], [12, 24]),
        ("language_model/layers_0/mlp/gate_proj/kernel", ["fsdp", "tensor"], [24, 20]),
        ("language_model/layers_0/mlp/down_proj/kernel", ["tensor", "fsdp"], [20, 24]),
        ("language_model/layers_0/input_layernorm/scale", [None], [48]),
        ("vision_tower/layers_0/self_attn/out_proj/kernel", ["tensor", "fsdp"], [8, 16]),
        ("vision_tower/layers_0/self_attn/v_proj/bias", ["tensor"], [8]),
        ("vision_tower/layers_2/mlp/fc1/bias", ["tensor"], [16]),
        ("vision_tower/layers_2/mlp/fc2/kernel", ["tensor", "fsdp"], [16, 16]),
        ("vision_tower/layers_2/mlp/fc2/bias", [None], [32]),
        ("connector/linear_1/kernel", ["fsdp", "tensor"], [16, 12]),
        ("connector/linear_2/kernel", ["tensor", "fsdp"], [12, 24]),
    ],
)
def test_parameters_lie_where_the_table_says(spread, path, spec, shard):
    placed = spread[0]["parameters"][path]
    assert placed == {"spec": spec, "shard": shard, "devices": 8}


def test_every_matrix_is_split(spread):
    """What stays whole on every device are vectors, the patch filter and the tower's position table."""
    whole = {path for path, placed in spread[0]["parameters"].items() if set(placed["spec"]) <= {None}}
    matrices = {path for path in whole if path.endswith(("/kernel", "/embedding"))}
    assert matrices == {"vision_tower/patch_embedding/kernel", "vision_tower/position_embedding/embedding"}


def test_results_equal_those_of_one_device(spread, model, mixed):
    results = spread[1]
    valid = mixed["attention_mask"].astype(bool)
    logits = np.asarray(model.logits(mixed))
    np.testing.assert_allclose(results["logits"][valid], logits[valid], rtol=0, atol=1e-4)
    for name, method in [("greedy", None), ("cmac", methods.CMAC(alpha=1.0))]:
        alone = model.generate(mixed, method, max_new_tokens=8)
        np.testing.assert_array_equal(results[name], alone.tokens)
        np.testing.assert_allclose(results[f"{name}_logprobs"], alone.logprobs, rtol=0, atol=1e-3)


def test_each_device_looks_at_its_share_of_the_images(spread, model, mixed):
    """Six images, and six disturbed ones of the contrast branch, over two devices along `fsdp`."""
    placed, results = spread
    assert placed["images"] == [[3, *mixed["pixel_values"].shape[1:]]] * 2
    twice = {name: np.concatenate([array, array]) for name, array in mixed.items()}
    step = model.prefill(twice, methods.VCD())[1]
    np.testing.assert_allclose(results["vcd"], np.stack([step.main, step.contrast]), rtol=0, atol=1e-4)


def test_one_axis_takes_what_the_others_leave():
    mesh = make_mesh(data=1, fsdp=-1, tensor=1)
    assert mesh.axis_names == AXES and dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 1, "tensor": 1},
        {"data": 3},
        {"data": 0, "fsdp": 1, "tensor": 1},
        {"fsdp": -1, "tensor": -1},
        {"data": -2, "fsdp": 1, "tensor": 1},
    ],
    ids=str,
)
def test_sizes_that_do_not_cover_the_devices(sizes):
    with pytest.raises(LVLMError, match="does not cover 1 devices"):
        make_mesh(**sizes)
