"""Precomputed log-probabilities: each token's own, found again, never taken for another model's."""

import os

import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.training.data import reference
from lvlm_jax.training.data.pair_batches import PAIR, Encoder, rows_of
from lvlm_jax.training.data.pair_files import read_pairs
from tests.training import pair_sets

PARAMS = {"layer": {"kernel": jnp.arange(12.0).reshape(3, 4) - 3, "bias": jnp.ones(2, jnp.bfloat16)}}


def score(params, batch):
    """In the place of log-probabilities the answers' token ids, scaled by a parameter."""
    found = [
        jnp.where(
            jnp.take_along_axis(batch[name]["answers"], batch[name]["columns"], axis=1),
            jnp.take_along_axis(batch[name]["tokens"], batch[name]["columns"], axis=1),
            -1,
        )
        for name in PAIR
    ]
    return jnp.stack(found, axis=1) * params["layer"]["kernel"][1, 1]


def never(params, batch):
    pytest.fail("it was computed again")


@pytest.fixture
def setting(model, tmp_path):
    """(rows, encoder) of five pairs whose pictures lie in `tmp_path`."""
    encoder = Encoder(model.processor, model.config)
    pairs = read_pairs(pair_sets.write(tmp_path))
    return rows_of(pairs, encoder.pair, encoder, 95, "error"), encoder


def compute(setting, folder, score=score, params=PARAMS, settings=None, size=2):
    rows, encoder = setting
    return reference.with_reference(rows, encoder, score, params, settings or {"dtype": "float32"}, folder, size)


def test_every_answer_token_gets_its_own(setting, tmp_path):
    rows = compute(setting, tmp_path / "cache")
    for row in rows:
        for tokens, found in zip(row.sequences.values(), row.reference, strict=True):
            np.testing.assert_array_equal(found, tokens.ids[tokens.answers] * 2)
    assert [row.id for row in rows] == [row.id for row in setting[0]]


def test_they_are_found_again_whatever_the_batch_size(setting, tmp_path):
    first = compute(setting, tmp_path / "cache")
    again = compute(setting, tmp_path / "cache", never, size=5)
    for row, other in zip(first, again, strict=True):
        for one, two in zip(row.reference, other.reference, strict=True):
            np.testing.assert_array_equal(one, two)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npz"]


def test_anything_that_decides_them_makes_another_file(setting, tmp_path):
    rows, encoder = setting
    plain = reference.digest(rows, encoder, PARAMS, {"dtype": "float32"})
    moved = {"layer": PARAMS["layer"] | {"kernel": PARAMS["layer"]["kernel"].at[2, 3].add(1e-6)}}
    assert reference.digest(rows, encoder, PARAMS, {"dtype": "float32"}) == plain
    assert reference.digest(rows, encoder, moved, {"dtype": "float32"}) != plain
    assert reference.digest(rows, encoder, PARAMS, {"dtype": "bfloat16"}) != plain
    assert reference.digest(rows[::-1], encoder, PARAMS, {"dtype": "float32"}) != plain
    os.utime(rows[0].images[0], (0, 0))
    assert reference.digest(rows, encoder, PARAMS, {"dtype": "float32"}) != plain


def test_a_damaged_file_is_computed_again(setting, tmp_path):
    compute(setting, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b""):
        path.write_bytes(damaged)
        compute(setting, tmp_path / "cache")
        assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_one_clear_line(setting, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(LVLMError, match="cannot be written"):
        compute(setting, tmp_path / "cache")


def test_a_full_disk_leaves_nothing_behind(setting, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LVLMError, match="cannot be written: No space left on device"):
        compute(setting, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
