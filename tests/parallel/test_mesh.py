"""A model spread over eight simulated devices, or over processes, gives what it gives on one device."""

import jax
import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.errors import LVLMError
from lvlm_jax.parallel import AXES, make_mesh, refuse_cut_heads
from tests.parallel import eight_devices, infer_over_processes
from tests.parallel.simulated import finish, in_a_process


@pytest.fixture(scope="module")
def inputs(mixed, tmp_path_factory):
    """A file of them."""
    path = tmp_path_factory.mktemp("mesh") / "inputs.npz"
    np.savez(path, **mixed)
    return path


@pytest.fixture(scope="module")
def spread(checkpoint, inputs):
    """(placements of parameters and images, results) from the process with eight devices."""
    words = checkpoint, inputs, inputs.with_name("results.npz")
    (placed,) = in_a_process("parallel.eight_devices", *words, count=8, quick=True)
    return placed, np.load(words[-1])


@pytest.fixture(scope="module")
def expected(model, mixed):
    return infer_over_processes.answers(model, mixed)


def assert_equal(found, expected, mixed):
    valid = mixed["attention_mask"].astype(bool)
    for name, values in expected.items():
        shown = valid if name == "logits" else ...
        atol = {"logits": 1e-4, "tokens": 0, "logprobs": 1e-3}[name]
        np.testing.assert_allclose(found[name][shown], np.asarray(values)[shown], rtol=0, atol=atol, err_msg=name)


PLACES = {
    "language_model/embed_tokens/embedding": (["tensor", "fsdp"], [130, 24]),
    "language_model/lm_head/kernel": (["fsdp", "tensor"], [24, 130]),
    "language_model/layers_0/self_attn/q_proj/kernel": (["fsdp", "tensor"], [24, 24]),
    "language_model/layers_1/self_attn/k_proj/kernel": (["fsdp", "tensor"], [24, 12]),
    "language_model/layers_1/self_attn/o_proj/kernel": (["tensor", "fsdp"], [24, 24]),
    "language_model/layers_0/mlp/gate_proj/kernel": (["fsdp", "tensor"], [24, 40]),
    "language_model/layers_0/mlp/down_proj/kernel": (["tensor", "fsdp"], [40, 24]),
    "language_model/layers_0/input_layernorm/scale": ([None], [48]),
    "vision_tower/layers_0/self_attn/out_proj/kernel": (["tensor", "fsdp"], [16, 16]),
    "vision_tower/layers_0/self_attn/v_proj/bias": (["tensor"], [16]),
    "vision_tower/layers_2/mlp/fc1/bias": (["tensor"], [32]),
    "vision_tower/layers_2/mlp/fc2/kernel": (["tensor", "fsdp"], [32, 16]),
    "vision_tower/layers_2/mlp/fc2/bias": ([None], [32]),
    "connector/linear_1/kernel": (["fsdp", "tensor"], [16, 24]),
    "connector/linear_2/kernel": (["tensor", "fsdp"], [24, 24]),
}


def test_parameters_lie_where_the_table_says(spread):
    """What stays whole on every device are vectors, the patch filter and the tower's position table."""
    placed = spread[0]["parameters"]
    assert {path: placed[path] for path in PLACES} == {path: [*place, 8] for path, place in PLACES.items()}
    whole = {path for path, (spec, *_) in placed.items() if set(spec) <= {None}}
    matrices = {path for path in whole if path.endswith(("/kernel", "/embedding"))}
    assert matrices == {"vision_tower/patch_embedding/kernel", "vision_tower/position_embedding/embedding"}


def test_results_on_eight_devices_equal_those_of_one(spread, expected, model, mixed):
    """Twelve images, and twelve disturbed ones of the contrast branch, over two devices each of `data` and `fsdp`."""
    placed, results = spread
    assert_equal(results, expected, mixed)
    assert placed["images"] == [[3, *mixed["pixel_values"].shape[1:]]] * 2
    fourfold = {name: np.concatenate([array] * 4) for name, array in mixed.items()}
    step = model.prefill(fourfold, methods.VCD())[1]
    np.testing.assert_allclose(results["vcd"], np.stack([step.main, step.contrast]), rtol=0, atol=1e-4)


def test_rows_are_replaced_and_beginnings_shared_on_eight_devices(spread, model):
    """Four rows over `data` and `fsdp`, key heads over `tensor`; a beginning of one row is on all devices."""
    told = spread[0]
    assert told["rows"] == eight_devices.replaced_rows(model)
    (heads, shape, devices), (rows, _, _) = told["spread"]
    assert heads[:2] == [["data", "fsdp"], "tensor"] and shape[:2] == [1, 1] and devices == 8
    assert rows == [["data", "fsdp"]]
    assert told["beginnings"] == [1] and told["alike"] == eight_devices.alike(model)


@pytest.mark.parametrize(
    "sizes",
    [(1, 2, 1), pytest.param((2, 1, 1), marks=pytest.mark.slow), pytest.param((1, 2, 2), marks=pytest.mark.slow)],
    ids=str,
)
def test_a_model_over_processes_answers_as_on_one_device(checkpoint, inputs, expected, mixed, tmp_path, sizes):
    words = [checkpoint, inputs, tmp_path / "found.npz", ",".join(map(str, sizes))]
    module = infer_over_processes.__name__
    finish(module, int(np.prod(sizes)), *words, errors=tmp_path / "errors")
    found = np.load(tmp_path / "found.npz")
    assert set(found) == set(expected)
    assert_equal(found, expected, mixed)


def test_sizes_cover_the_devices():
    """One axis takes the devices that the others leave."""
    mesh = make_mesh(data=1, fsdp=-1, tensor=1)
    assert mesh.axis_names == AXES and dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    for sizes in ((2, 1, 1), (3,), (0, 1, 1), (1, -1, -1), (-2, 1, 1)):
        with pytest.raises(LVLMError, match="does not cover 1 devices"):
            make_mesh(**dict(zip(AXES, sizes, strict=False)))


@pytest.mark.parametrize(("heads", "key_heads", "ways", "fitting"), [(28, 4, 8, "1, 2, 4"), (32, 8, 5, "1, 2, 4, 8")])
def test_a_mesh_that_cuts_heads_is_refused(heads, key_heads, ways, fitting):
    mesh = jax.sharding.AbstractMesh((1, 1, ways), AXES)
    with pytest.raises(LVLMError, match=f"tensor={ways} cuts .* {heads} .* {key_heads} key heads.* one of {fitting} "):
        refuse_cut_heads(mesh, heads, key_heads)
    refuse_cut_heads(jax.sharding.AbstractMesh((ways, 1, 4), AXES), heads, key_heads)
