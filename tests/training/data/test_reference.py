"""Precomputed log-probabilities: each token's own, found again, never taken for another model's."""

import os

import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.training.data import reference
from lvlm_jax.training.data.pair_batches import PAIR, rows_of
from lvlm_jax.training.data.pair_files import read_pairs
from tests.training import pair_sets

PARAMS = {"layer": {"kernel": jnp.arange(12.0).reshape(3, 4) - 3, "bias": jnp.ones(2, jnp.bfloat16)}}
SETTINGS = {"dtype": "float32"}


def score(params, batch):
    """Stands in for log-probabilities: the answers' token ids, scaled by a parameter."""
    found = []
    for name in PAIR:
        answers, tokens = (
            jnp.take_along_axis(batch[name][key], batch[name]["columns"], axis=1) for key in ("answers", "tokens")
        )
        found.append(jnp.where(answers, tokens, -1))
    return jnp.stack(found, axis=1) * params["layer"]["kernel"][1, 1]


def never(params, batch):
    pytest.fail("it was computed again")


@pytest.fixture
def compute(rows, encoder, tmp_path):
    def computed(score=score, size=2):
        return reference.with_reference(rows, encoder, score, PARAMS, SETTINGS, tmp_path / "cache", size)

    return computed


def test_every_answer_token_gets_its_own_and_they_are_found_again(rows, compute, tmp_path):
    """Whatever the batch size; a damaged file is computed again."""
    first = compute()
    assert [row.id for row in first] == [row.id for row in rows]
    for row, other in zip(first, compute(never, size=5), strict=True):
        for tokens, found, again in zip(row.sequences.values(), row.reference, other.reference, strict=True):
            np.testing.assert_array_equal(found, tokens.ids[tokens.answers] * 2)
            np.testing.assert_array_equal(again, found)
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b""):
        path.write_bytes(damaged)
        compute()
        assert path.suffix == ".npz" and path.read_bytes() == whole


def test_anything_that_decides_them_makes_another_file(encoder, tmp_path):
    rows = rows_of(read_pairs(pair_sets.write(tmp_path)), encoder.pair, encoder, 95, "error")
    kernel = PARAMS["layer"]["kernel"]
    moved = {"layer": PARAMS["layer"] | {"kernel": kernel.at[2, 3].add(1e-6)}}

    def digest(rows=rows, params=PARAMS, dtype="float32"):
        return reference.digest(rows, encoder, params, {"dtype": dtype})

    plain = digest()
    others = digest(params=moved), digest(rows[::-1]), digest(dtype="bfloat16")
    assert digest() == plain and plain not in others
    os.utime(rows[0].images[0], (0, 0))
    assert digest() != plain


def test_a_cache_that_cannot_be_written_is_one_clear_line_and_leaves_nothing_behind(compute, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(LVLMError, match="cannot be written: No space left on device"):
            compute()
    assert not list((tmp_path / "cache").iterdir())
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(LVLMError, match="cannot be written"):
        compute()
