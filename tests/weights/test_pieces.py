"""Fused tensors: cut into parameters, put together again, and what is said where they do not fit."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lvlm_jax import LVLM
from lvlm_jax.errors import LVLMError
from lvlm_jax.weights.save import stored_shapes
from lvlm_jax.weights.tables import LINEAR, Piece, Row, Table, fused, table_for
from tests.models.families.internvl import INTERNVL, write_chat

# Shares and groups of configurations with a field for each.
PIECES = [Piece(index, lambda c: c.shares, lambda c: c.groups) for index in range(3)]


@pytest.mark.parametrize(
    ("shares", "groups", "unit"), [((1, 1, 1), 1, 4), ((3, 1, 1), 2, 2), ((1, 1, 1), 3, 1), ((2, 5, 1), 1, 3)]
)
@pytest.mark.parametrize("rest", [(), (5,)])
def test_pieces_make_the_whole_again(shares, groups, unit, rest):
    config = SimpleNamespace(shares=shares, groups=groups)
    whole = np.random.default_rng(0).normal(size=(groups * sum(shares) * unit, *rest))
    taken = [piece.take(whole, config) for piece in PIECES]
    np.testing.assert_array_equal(fused(taken, shares, groups), whole)
    for piece, part in zip(PIECES, taken, strict=True):
        assert piece.shape(whole.shape, config) == part.shape == (groups * shares[piece.index] * unit, *rest)
        assert piece.whole(part.shape, config) == whole.shape


def test_a_piece_takes_its_share_of_every_group():
    """Two key heads with two query heads each, of one row: q0 q1 k0 v0 q2 q3 k1 v1."""
    config = SimpleNamespace(shares=(2, 1, 1), groups=2)
    taken = [piece.take(np.arange(8), config).tolist() for piece in PIECES]
    assert taken == [[0, 1, 4, 5], [2, 6], [3, 7]]


def test_a_single_group_is_not_copied():
    config = SimpleNamespace(shares=(1, 1, 1), groups=1)
    whole = np.zeros((6, 4))
    assert all(np.shares_memory(piece.take(whole, config), whole) for piece in PIECES)


@pytest.mark.parametrize("rows", [7, 8])
def test_a_tensor_that_cannot_be_cut_has_no_shape(rows):
    config = SimpleNamespace(shares=(2, 1, 1), groups=4)
    assert PIECES[1].shape((rows, 4), config) == () and PIECES[1].shape((), config) == ()


def rows_of(*pieces, name="qkv"):
    return tuple(Row("a", f"{index}/kernel", name, LINEAR, piece) for index, piece in enumerate(pieces))


@pytest.mark.parametrize(
    ("rows", "own", "message"),
    [
        ((Row("a", "x/kernel", "x.weight"), Row("a", "x/kernel", "y.weight")), {}, "same tensor"),
        ((Row("a", "x/kernel", "x.weight"), Row("a", "y/kernel", "x.weight")), {}, "same tensor"),
        (rows_of(PIECES[0], PIECES[0]), {}, "same tensor"),
        (rows_of(PIECES[0], None), {}, "same tensor"),
        (rows_of(PIECES[0], PIECES[2]), {}, "do not make it whole"),
        (rows_of(*PIECES), {"x": (Row("a", "9/kernel", "w"),)}, "without a common one"),
        (rows_of(*PIECES), {"x": (Row("a", "0/kernel", "q"),)}, "do not make it whole"),
        (rows_of(*PIECES), {"x": (Row("a", "0/kernel", "q"), Row("a", "0/kernel", "p"))}, "same tensor"),
    ],
)
def test_tables_that_contradict_themselves(rows, own, message):
    with pytest.raises(ValueError, match=message):
        Table(rows=rows, schemes={"x": {"a": ""}, "y": {"a": ""}}, own=own)


def test_a_scheme_may_store_a_parameter_in_a_way_of_its_own():
    apart = tuple(Row("a", f"layers_{{i}}/{name}/kernel", f"{{i}}.{name}", LINEAR) for name in "qkv")
    joint = tuple(
        dataclasses.replace(row, name="{i}.qkv", piece=piece) for row, piece in zip(apart, PIECES, strict=True)
    )
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


QKV = "vision_model.encoder.layers.1.attn.qkv"
WQKV = "language_model.model.layers.0.attention.wqkv"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # One row too many, which dividing would hide.
        (
            lambda s: {f"{QKV}.weight": np.zeros((97, 32), np.float32)},
            rf"1 misshapen: {QKV}.weight \[97, 32\] instead of \[96, 32\]",
        ),
        (
            lambda s: {f"{WQKV}.weight": s[f"{WQKV}.weight"][:48]},
            rf"1 misshapen: {WQKV}.weight \[48, 48\] instead of \[96, 48\]",
        ),
        (lambda s: {f"{WQKV}.bias": np.zeros(95, np.float32)}, rf"1 misshapen: {WQKV}.bias \[95\] instead of \[96\]"),
        (lambda s: {f"{WQKV}.bias": np.zeros(96, np.int32)}, f"1 not floating-point: {WQKV}.bias"),
        (lambda s: {f"{QKV}.bias": None}, f"1 missing: {QKV}.bias"),
        (
            lambda s: {"language_model.model.layers.0.self_attn.q_proj.weight": np.zeros((48, 48), np.float32)},
            "1 stored twice: .*wqkv.weight",
        ),
        (lambda s: {f"{WQKV}.scale": np.zeros(1, np.float32)}, f"1 unexpected: {WQKV}.scale"),
    ],
)
def test_faults_are_told_of_the_stored_tensor(internlm2, tmp_path, change, message):
    for file in internlm2.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(internlm2 / "model.safetensors")
    state = {name: tensor for name, tensor in (state | change(state)).items() if tensor is not None}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(LVLMError, match=message):
        LVLM.from_pretrained(tmp_path)


def test_schemes_of_one_table_agree_on_shared_names(internlm2):
    """A name that two schemes give must mean the same parameter in both, stored in the same way."""
    config = LVLM.from_pretrained(internlm2).config
    table, claimed = table_for(config), {}
    shapes = {scheme: stored_shapes(config, scheme) for scheme in table.schemes}
    for names in shapes.values():
        for name, shape in names.items():
            assert claimed.setdefault(name, shape) == shape
