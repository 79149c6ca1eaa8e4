"""The geometry of tiles against transformers' and torch's own functions, and the programs it leads to."""

import numpy as np
import pytest
import torch
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.tiles import Tiling, bilinear, unpadded, with_newlines

# LLaVA-NeXT's and LLaVA-OneVision's, as published.
NEXT = Tiling(336, 24, ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)))
ONEVISION = Tiling(384, 27, tuple((384 * down, 384 * across) for down in range(1, 7) for across in range(1, 7)))


def random_sizes(count):
    """Heights and widths between 8 and 4000, most of them of moderate aspect ratio."""
    generator = np.random.default_rng(1)
    height = np.exp(generator.uniform(np.log(8), np.log(4000), count))
    width = height * np.exp(generator.normal(0, 0.5, count))
    return [(int(h), max(8, int(w))) for h, w in zip(height, width, strict=True)]


@pytest.mark.parametrize("tiling", [NEXT, ONEVISION], ids=["next", "onevision"])
def test_resolution_and_border_are_those_of_transformers(tiling):
    for size in random_sizes(120):
        down, across = tiling.grid(size)
        best = select_best_resolution(size, list(tiling.resolutions))
        assert (down * tiling.tile, across * tiling.tile) == best
        tiles = torch.arange(down * across * tiling.side**2).view(down, across, tiling.side, tiling.side)
        whole = tiles.permute(0, 2, 1, 3).reshape(1, down * tiling.side, across * tiling.side)
        # Two tiles lie before these, and the token that ends a row before all.
        expected = unpad_image(whole, size)[0].numpy() + 2 * tiling.side**2 + 1
        np.testing.assert_array_equal(tiling.enlarged(2, size), expected)


def test_resizing_borders_and_newlines():
    """Bilinear as torch's; an image that fits keeps its border; rows end with a newline."""
    for shape, wanted in (((54, 81), (50, 76)), ((162, 100), (103, 63)), ((7, 5), (3, 4))):
        values = np.random.default_rng(2).normal(size=shape).astype(np.float32)
        index, weights = bilinear(np.arange(values.size).reshape(shape), *wanted)
        got = (values.reshape(-1)[index] * weights).sum(-1)
        expected = torch.nn.functional.interpolate(torch.from_numpy(values)[None, None], wanted, mode="bilinear")
        np.testing.assert_allclose(got, expected[0, 0].numpy(), rtol=0, atol=2e-6)
    whole = np.arange(12).reshape(3, 4)
    for size, kept in (((30, 40), whole), ((10, 40), whole[1:2]), ((30, 20), whole[:, 1:3])):
        np.testing.assert_array_equal(unpadded(whole, size), kept)
    np.testing.assert_array_equal(with_newlines(np.array([[3, 4], [5, 6]]), 0), [3, 4, 0, 5, 6, 0])
    pairs = with_newlines(np.ones((2, 1, 2), np.float32), (0, 7))
    np.testing.assert_array_equal(pairs, [[1, 1], [0, 7], [1, 1], [0, 7]])
    with pytest.raises(LVLMError, match="4000 x 1 pixels"):
        NEXT.grid((1, 4000))


def test_few_programs_serve_all_sizes():
    """What is compiled follows from the shapes; single images of LLaVA-OneVision have 2 to 37 tiles."""
    shapes = set()
    tiling = Tiling(6, 3, tuple((6 * h // 384, 6 * w // 384) for h, w in ONEVISION.resolutions))
    for size in random_sizes(200):
        down, across = ONEVISION.grid(size)
        pixels = np.zeros((1, 1 + down * across, 3, 6, 6), np.float32)
        pictures = tiling.packed(pixels, [1 + down * across], index=[np.arange(9)])
        shapes.add((pictures.pixels.shape, pictures.geometry["index"].shape))
    assert 4 <= len(shapes) <= 10
