"""Resampled tables of positions against torch's own interpolation of pictures."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lvlm_jax.models import interpolation
from lvlm_jax.models.loose_patches import patch_rows

SIZES = [(6, 6), (4, 14), (12, 2), (30, 18)]  # as large as the table, above and below it


@pytest.mark.parametrize(
    ("place", "taps", "torchs"),
    [
        (interpolation.corner_aligned, interpolation.linear_taps, dict(mode="bilinear", align_corners=True)),
        (interpolation.center_aligned, interpolation.linear_taps, dict(mode="bilinear", align_corners=False)),
        (interpolation.center_aligned, interpolation.cubic_taps, dict(mode="bicubic", align_corners=False)),
    ],
)
def test_positions_are_the_table_resized_to_each_picture(place, taps, torchs):
    side, width = 6, 5
    table = np.random.default_rng(0).normal(size=(side**2, width)).astype(np.float32)
    count = sum(height * columns for height, columns in SIZES)
    pictures = patch_rows(
        [{"pixel_values": np.zeros((count, 3)), "image_grid_thw": np.array([(1, *size) for size in SIZES])}], 3, 2
    )
    placed = interpolation.with_positions(pictures, 2, side, place, taps)
    module = interpolation.ResampledPositions(side**2, width)
    geometry = placed.geometry
    read = (jnp.asarray(geometry[name]) for name in ("entries", "weights"))
    got = np.asarray(module.apply({"params": {"embedding": table}}, *read))
    picture = torch.from_numpy(table).T.reshape(1, width, side, side)
    for image, size in enumerate(SIZES):
        valid = geometry["valid"][image]
        want = F.interpolate(picture, size, **torchs)[0].permute(1, 2, 0).numpy()
        rows, columns = geometry["coordinates"][image, valid].T
        np.testing.assert_allclose(got[image, valid], want[rows, columns], rtol=0, atol=1e-5)
        assert np.all(got[image, ~valid] == 0)
