"""Attention maps over images: the region that a map covers, the words, the drawing."""

import numpy as np
import pytest
from PIL import Image

from lvlm_jax.analysis import overlay
from lvlm_jax.errors import LVLMError


def test_what_maps_cover():
    assert overlay.seen_region(300, 200, "crop") == (50, 0, 250, 200)
    assert overlay.seen_region(200, 300, "crop") == (0, 50, 200, 250)
    assert overlay.seen_region(300, 200, "pad") == (0, -50, 300, 250)
    assert overlay.seen_region(300, 200, "stretch") is None


def test_relative_maps_take_away_what_all_words_share():
    maps = np.full((3, 2, 2), 0.1)
    maps[:, 0, 0] = 5.0  # every word looks here
    maps[1, 1, 1] = 0.4
    assert maps[1].argmax() == 0
    assert overlay.relative(maps)[1].argmax() == 3


def row(maps, words, text="An answer costs $5 and $6"):
    return overlay.ImageRow("CMAC", Image.new("RGB", (30, 20)), text, words, maps)


def test_words_that_stand_out_are_chosen_in_reading_order():
    maps = np.ones((5, 2, 2))
    maps[1, 0, 0] = 9  # "dog"
    maps[3, 1, 1] = 30  # "cup"
    maps[4, 0, 1] = 90  # "the" names nothing
    assert overlay.choose_words(row(maps, ["red", "dog", "car", "cup", "the"]), 2) == [1, 3]
    assert overlay.choose_words(row(maps[:0], []), 2) == []


def test_a_png_with_one_row_for_each_answer(tmp_path):
    maps = np.random.default_rng(0).random((3, 4, 4))
    full, empty = row(maps, ["dog", "cup", "car"]), row(maps[:0], [], text="")
    overlay.draw(tmp_path / "new" / "one.png", [full])
    overlay.draw(tmp_path / "two.png", [full, empty])
    one, two = Image.open(tmp_path / "new" / "one.png"), Image.open(tmp_path / "two.png")
    assert one.format == two.format == "PNG"
    assert two.width == one.width and two.height > 1.9 * one.height
    # The heat colours the picture, which is black.
    assert np.asarray(one.convert("RGB")).std(-1).max() > 30
    with pytest.raises(LVLMError, match="cannot be written"):
        overlay.draw(tmp_path / "two.png" / "map.png", [full])
