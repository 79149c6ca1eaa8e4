"""mDPO: its three terms by hand, and the pictures that stand on the rejected side."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lvlm_jax.training.data import pair_files
from lvlm_jax.training.data.pair_batches import assemble, pictures_of, shape_of
from lvlm_jax.training.data.pictures import Cropped, opened_rgb
from lvlm_jax.training.objectives import mdpo
from tests.training import pair_sets


def test_two_pairs_by_hand():
    """Δ is 2, -1 and 1 in the first pair, -1, 1 and -2 in the second; β 0.5, δ 0.25."""
    delta = np.array([[[1.5, 0.5], [-1.0, 9.0], [0.25, 0.75]], [[-1.0, 9.0], [0.5, 0.5], [-2.0, 9.0]]], np.float32)
    mask = np.array([[[1, 1], [1, 0], [1, 1]], [[1, 0], [1, 1], [1, 0]]], bool)
    reference = np.full_like(delta, -3.0)
    found = mdpo.losses(*map(jnp.asarray, (delta + reference, reference, mask)), jnp.ones(2), beta=0.5, delta=0.25)
    margins = {"text": (1.5, -1.0), "image": (0.5, 0.5), "anchor": (0.75, -0.75)}
    wanted = {name: np.mean([np.log1p(np.exp(-h)) for h in both]) for name, both in margins.items()}
    rewards = {"chosen": 0.25, "rejected": 0.0, "other_pictures": -0.25, "accuracy": 0.5}
    wanted |= {f"rewards/{name}": value for name, value in rewards.items()} | {"image_accuracy": 1.0}
    assert pair_sets.values(found) == pytest.approx(wanted, rel=1e-5)


def test_a_part_of_each_picture_stands_in_its_place(encoder, tmp_path):
    """Of 1 to 20 % of its area, the same for a seed and a row, and enlarged to the picture's size."""
    pairs = pair_files.read_pairs(pair_sets.write(tmp_path, side=40))
    rows, again = ([mdpo.encode(0.01, 0.2, 7, encoder, pair) for pair in pairs] for _ in range(2))
    assert [row.pictures for row in rows] == [row.pictures for row in again]
    assert rows[0].pictures != mdpo.encode(0.01, 0.2, 8, encoder, pairs[0]).pictures
    parts = [part for row in rows for part in row.pictures[mdpo.OTHER]]
    areas = [(part.box[2] - part.box[0]) * (part.box[3] - part.box[1]) for part in parts]
    assert all(0.01 <= area <= 0.2 for area in areas) and len(set(areas)) == len(areas)
    assert all(0 <= edge <= 1 for part in parts for edge in part.box)
    lower_right = np.zeros((30, 40), np.uint8)
    lower_right[15:, 20:] = 200
    Image.fromarray(lower_right).save(tmp_path / "corner.png")
    shown = opened_rgb(Cropped(tmp_path / "corner.png", (0.5, 0.5, 1.0, 1.0)))
    assert shown.size == (40, 30) and (np.asarray(shown) == 200).all()
    batch = assemble(encoder, rows, range(5), shape_of(rows, encoder, 5))
    others = batch[pictures_of(mdpo.OTHER)]["images"]
    assert others.shape == batch["images"].shape and np.abs(others - batch["images"]).max() > 0.1
    np.testing.assert_array_equal(batch[mdpo.OTHER]["tokens"], batch["chosen"]["tokens"])
    assert pictures_of("rejected") not in batch
