"""A model spread over eight simulated devices gives what it gives on one."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.errors import LVLMError
from lvlm_jax.parallel import AXES, make_mesh, refuse_cut_heads

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
        ("language_model/embed_tokens/embedding", ["tensor", "fsdp"], [130, 24]),
        ("language_model/lm_head/kernel", ["fsdp", "tensor"], [24, 130]),
        ("language_model/layers_0/self_attn/q_proj/kernel", ["fsdp", "tensor"], [24, 24]),
        ("language_model/layers_1/self_attn/k_proj/kernel", ["fsdp", "tensor"], [24, 12]),
        ("language_model/layers_1/self_attn/o_proj/kernel", ["tensor", "fsdp"], [24, 24]),
        ("language_model/layers_0/mlp/gate_proj/kernel", ["fsdp", "tensor"], [24, 40]),
        ("language_model/layers_0/mlp/down_proj/kernel", ["tensor", "fsdp"], [40, 24]),
        ("language_model/layers_0/input_layernorm/scale", [None], [48]),
        ("vision_tower/layers_0/self_attn/out_proj/kernel", ["tensor", "fsdp"], [16, 16]),
        ("vision_tower/layers_0/self_attn/v_proj/bias", ["tensor"], [16]),
        ("vision_tower/layers_2/mlp/fc1/bias", ["tensor"], [32]),
        ("vision_tower/layers_2/mlp/fc2/kernel", ["tensor", "fsdp"], [32, 16]),
        ("vision_tower/layers_2/mlp/fc2/bias", [None], [32]),
        ("connector/linear_1/kernel", ["fsdp", "tensor"], [16, 24]),
        ("connector/linear_2/kernel", ["tensor", "fsdp"], [24, 24]),
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
    """Twelve images, and twelve disturbed ones of the contrast branch, over two devices each of `data` and `fsdp`."""
    placed, results = spread
    assert placed["images"] == [[3, *mixed["pixel_values"].shape[1:]]] * 2
    fourfold = {name: np.concatenate([array] * 4) for name, array in mixed.items()}
    step = model.prefill(fourfold, methods.VCD())[1]
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


@pytest.mark.parametrize(("heads", "key_heads", "ways", "fitting"), [(28, 4, 8, "1, 2, 4"), (32, 8, 5, "1, 2, 4, 8")])
def test_a_mesh_that_cuts_heads_is_refused(heads, key_heads, ways, fitting):
    mesh = jax.sharding.AbstractMesh((1, 1, ways), AXES)
    with pytest.raises(LVLMError, match=f"tensor={ways} cuts .* {heads} .* {key_heads} key heads.* one of {fitting} "):
        refuse_cut_heads(mesh, heads, key_heads)
    refuse_cut_heads(jax.sharding.AbstractMesh((ways, 1, 4), AXES), heads, key_heads)
