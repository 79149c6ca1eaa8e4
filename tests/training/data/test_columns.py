"""Columns of data files: those that are used change what is learned, and no other one passes unnoticed."""

import collections
import dataclasses

import numpy as np
import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.training.data import pair_files
from lvlm_jax.training.data.batches import Batches
from lvlm_jax.training.data.pair_batches import alike, assemble, pictures_of, rows_of, shape_of
from tests.training import pair_sets

ROW = {"images": ["0.png"], "prompt": "What?", "chosen": "a cat", "rejected": "a dog"}


@pytest.fixture
def written(tmp_path):
    pair_sets.draw(tmp_path, 4)
    return lambda *changes: pair_sets.write_rows(tmp_path / "pairs.jsonl", [ROW | change for change in changes])


def test_pictures_of_the_rejected_side_are_shown_there(written, encoder):
    """Rows without `rejected_images` use the shared images; equal texts about different images are a pair."""
    same_text = {"rejected": "a cat", "rejected_images": ["2.png"]}
    path = written({"rejected_images": ["1.png"], "weight": 0.5}, same_text, {})
    pairs = pair_files.read_pairs(path)
    rows = alike(rows_of(pairs, encoder.pair, encoder, 95, "error"))
    batch = assemble(encoder, rows, range(3), shape_of(rows, encoder, 3))
    shown, own = batch["images"], batch[pictures_of("rejected")]["images"]
    moved = np.abs(shown - own)[:3].max(axis=(1, 2, 3)) > 0
    assert moved.tolist() == [True, True, False] and batch["weight"].tolist() == [0.5, 1, 1]
    copied = pair_files.read_pairs(pair_sets.write_rows(path.parent / "copy.jsonl", [
        pair_files.row_of(pair, path.parent) for pair in pairs
    ]))  # fmt: skip
    assert [dataclasses.replace(pair, id="") for pair in copied] == [dataclasses.replace(pair, id="") for pair in pairs]


@pytest.mark.parametrize("recipe", ["dpo", "sft", "kto", "mdpo", "flow_alignment"])
def test_a_column_that_nothing_uses_is_an_error(written, model, tmp_path, recipe):
    path = written({"source": "me"}, {"score": 3, "margin": 0.5})
    with pytest.raises(LVLMError, match=r"row 2.* has the column 'score', which training does not use"):
        pair_sets.task(model, path, tmp_path, recipe)
    pair_sets.task(model, path, tmp_path, recipe, ignore="score, margin")


def test_files_are_drawn_from_as_often_as_is_said(tmp_path, model):
    files = []
    for name, pairs in (("a", pair_sets.PAIRS[:4]), ("b", pair_sets.PAIRS[4:])):
        (tmp_path / name).mkdir()
        files.append(str(pair_sets.write(tmp_path / name, pairs)))
    data = ", ".join(files)
    source = pair_sets.task(model, data, tmp_path, data_shares="1, 3").source
    drawn = collections.Counter(index for step in range(16) for index in source.order(step))
    assert drawn[4] == 60 and all(drawn[row] == 5 for row in range(4))
    plain = pair_sets.task(model, data, tmp_path).source
    assert isinstance(plain, Batches) and sorted(plain.order(0)) == [0, 1, 2, 3, 4]
    for shares in ("1", "1, 0", "1, x"):
        with pytest.raises(LVLMError, match=f"data_shares is '{shares}' and data names 2 files"):
            pair_sets.task(model, data, tmp_path, data_shares=shares)
