"""Fused tensors: split into parameters, joined again, and the message if they do not fit."""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lvlm_jax import LVLM
from lvlm_jax.weights.save import stored_shapes
from lvlm_jax.weights.tables import LINEAR, Piece, Row, Table, fuse, table_for
from tests.models.families.internvl import INTERNVL, write_chat
from tests.refusals import refused

# Shares and groups of configurations with a field for each.
PIECES = [Piece(index, lambda c: c.shares, lambda c: c.groups) for index in range(3)]


def test_a_piece_takes_its_share_of_every_group():
    """Two key heads with two query heads each, of one row: q0 q1 k0 v0 q2 q3 k1 v1."""
    config = SimpleNamespace(shares=(2, 1, 1), groups=2)
    taken = [piece.take(np.arange(8), config).tolist() for piece in PIECES]
    assert taken == [[0, 1, 4, 5], [2, 6], [3, 7]]
    np.testing.assert_array_equal(fuse(list(map(np.array, taken)), config.shares, config.groups), np.arange(8))
    config, whole = SimpleNamespace(shares=(1, 1, 1), groups=1), np.zeros((6, 4))
    assert all(np.shares_memory(piece.take(whole, config), whole) for piece in PIECES)  # a single group is not copied
    config = SimpleNamespace(shares=(2, 1, 1), groups=4)  # a tensor that cannot be cut has no shape
    assert [PIECES[1].shape(shape, config) for shape in ((7, 4), (8, 4), ())] == [()] * 3


def rows_of(*pieces, name="qkv"):
    return tuple(Row("a", f"{index}/kernel", name, LINEAR, piece) for index, piece in enumerate(pieces))


@pytest.mark.parametrize(
    ("rows", "own", "message"),
    [
        ((Row("a", "x/kernel", "x.weight"), Row("a", "x/kernel", "y.weight")), (), "same tensor"),
        ((Row("a", "x/kernel", "x.weight"), Row("a", "y/kernel", "x.weight")), (), "same tensor"),
        (rows_of(PIECES[0], PIECES[0]), (), "same tensor"),
        (rows_of(PIECES[0], None), (), "same tensor"),
        (rows_of(PIECES[0], PIECES[2]), (), "do not make it whole"),
        (rows_of(*PIECES), (Row("a", "9/kernel", "w"),), "without a common one"),
        (rows_of(*PIECES), (Row("a", "0/kernel", "q"),), "do not make it whole"),
        (rows_of(*PIECES), (Row("a", "0/kernel", "q"), Row("a", "0/kernel", "p")), "same tensor"),
    ],
)
def test_tables_that_contradict_themselves(rows, own, message):
    with pytest.raises(ValueError, match=message):
        Table(rows=rows, schemes={"x": {"a": ""}, "y": {"a": ""}}, own={"x": own} if own else {})


def test_a_scheme_may_store_a_parameter_in_a_way_of_its_own():
    apart = tuple(Row("a", f"layers_{{i}}/{name}/kernel", f"{{i}}.{name}", LINEAR) for name in "qkv")
    pairs = zip(apart, PIECES, strict=True)
    joint = tuple(dataclasses.replace(row, name="{i}.qkv", piece=piece) for row, piece in pairs)
    table = Table(rows=apart, schemes={"apart": {"a": "m."}, "joint": {"a": "n."}}, own={"joint": joint})
    paths = [f"layers_{layer}/{name}/kernel" for layer in (0, 1) for name in "qkv"]
    assert table.names(paths, "joint") == {"n.0.qkv": paths[:3], "n.1.qkv": paths[3:]}
    assert list(table.names(paths, "apart")) == [f"m.{layer}.{name}" for layer in (0, 1) for name in "qkv"]
    assert table.row(paths[4], "joint") == (joint[1], "1") and table.row(paths[4], "apart") == (apart[1], "1")


@pytest.fixture(scope="module")
def internlm2(tmp_path_factory):
    """A checkpoint with both kinds of fused tensors, with biases."""
    folder = tmp_path_factory.mktemp("internlm2")
    return write_chat(folder, INTERNVL.build(None, 3, text={"model_type": "llama", "attention_bias": True}), True)


def test_faults_are_told_of_the_stored_tensor(internlm2, tmp_path):
    folder = shutil.copytree(internlm2, tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    qkv, layer = "vision_model.encoder.layers.1.attn.qkv", "language_model.model.layers.0"
    wqkv = f"{layer}.attention.wqkv"
    float32 = np.float32
    for name, tensor, message in (
        # One row too many, which dividing would hide.
        (f"{qkv}.weight", np.zeros((97, 32), float32), r"1 misshapen: {} \[97, 32\] instead of \[96, 32\]"),
        (f"{wqkv}.weight", state[f"{wqkv}.weight"][:48], r"1 misshapen: {} \[48, 48\] instead of \[96, 48\]"),
        (f"{wqkv}.bias", np.zeros(95, float32), r"1 misshapen: {} \[95\] instead of \[96\]"),
        (f"{wqkv}.bias", np.zeros(96, np.int32), "1 not floating-point: {}"),
        (f"{qkv}.bias", None, "1 missing: {}"),
        (f"{layer}.self_attn.q_proj.weight", np.zeros((48, 48), float32), "1 stored twice: .*wqkv.weight"),
        (f"{wqkv}.scale", np.zeros(1, float32), "1 unexpected: {}"),
    ):
        kept = {key: value for key, value in (state | {name: tensor}).items() if value is not None}
        save_file(kept, folder / "model.safetensors")
        refused(message.format(name), LVLM.from_pretrained, folder)


def test_schemes_of_one_table_agree_on_shared_names(internlm2):
    """A name that two schemes give must mean the same parameter in both, stored in the same way."""
    config, claimed = LVLM.from_pretrained(internlm2).config, {}
    for scheme in table_for(config).schemes:
        for name, shape in stored_shapes(config, scheme).items():
            assert claimed.setdefault(name, shape) == shape
