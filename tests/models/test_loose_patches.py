"""What families with loose patches share: shapes of rows, attention by blocks, patches of pictures in a batch."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lvlm_jax import LVLM, models
from lvlm_jax.models import loose_patches, qwen_vision, vision
from lvlm_jax.models.pictures import round_up_to_bucket
from lvlm_jax.models.vision import patch_attention
from tests.models.families.patches import QWEN2_5_VL, QWEN2_VL
from tests.models.test_published import published


def rows(sizes):
    """The patches of images of these sizes."""
    sizes = np.array(sizes)
    arrays = {"pixel_values": np.zeros((sizes.prod(axis=1).sum(), 12)), "image_grid_thw": sizes}
    return loose_patches.patch_rows([arrays], channels=12, merge=2)


def test_pictures_of_all_sizes_take_few_shapes():
    """Each shape is a program of the tower: up to 16384 tokens, the largest picture the published processors give."""
    shapes = {round_up_to_bucket(tokens, loose_patches.SMALLEST_ROW) for tokens in range(1, 16385)}
    assert len(shapes) == 20 and max(shapes) == 16384

    found = [rows([[1, height, width]]) for height in range(2, 25, 2) for width in range(2, 25, 2)]
    patches = (64, 128, 192, 256, 384, 512, 768)
    assert {row.pixels.shape for row in found} == {(1, count, 12) for count in patches}
    assert all(len(row.geometry["order"]) * 4 == row.pixels.shape[1] for row in found)


@pytest.mark.parametrize(("height", "width"), [(10, 26), (6, 40), (24, 8)])
def test_windows_and_blocks_give_what_all_patches_at_once_give(monkeypatch, height, width):
    """Together with a small image, whose row is padded; windows of 8 x 8 end at the image's edge."""
    geometry = rows([[1, height, width], [1, 4, 6]]).geometry
    coordinates, valid = map(jnp.asarray, (geometry["coordinates"], geometry["valid"]))
    windows = qwen_vision.window_numbers(coordinates, valid, 8)
    order = jnp.argsort(windows, axis=1, stable=True)
    windows, valid = (jnp.take_along_axis(array, order, axis=1) for array in (windows, valid))
    shape = (3, *windows.shape, 2, 8)
    query, key, value = jnp.asarray(np.random.default_rng(3).normal(size=shape), jnp.float32)
    monkeypatch.setattr(qwen_vision, "LARGEST_MAP", 2 * 2 * 2 * 3 * 64**2)  # two blocks of windows at a time
    monkeypatch.setattr(vision, "STREAM_FROM", 1)
    for got, mask in (
        (qwen_vision.window_attention(query, key, value, windows, 64), windows[:, :, None] == windows[:, None, :]),
        (vision.picture_attention(query, key, value, valid), valid[:, None, :]),
    ):
        want = patch_attention(query, key, value, mask)
        np.testing.assert_allclose(*(jnp.where(valid[..., None, None], mixed, 0) for mixed in (got, want)), atol=1e-6)


@pytest.mark.parametrize(("rows", "patches"), [(1, 96), (5, 12), (5, 7)])
def test_chunks_of_an_mlp_give_what_the_whole_gives(monkeypatch, rows, patches):
    class Wrapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            return qwen_vision.apply_in_chunks(nn.Dense(4), x)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(rows, patches, 4)), jnp.float32)
    params = Wrapped().init(jax.random.key(0), x)
    want = Wrapped().apply(params, x)
    monkeypatch.setattr(qwen_vision, "CHUNK", 16)
    assert jax.tree.structure(Wrapped().init(jax.random.key(0), x)) == jax.tree.structure(params)
    np.testing.assert_allclose(Wrapped().apply(params, x), want, atol=1e-6)


def published_with_processor(family, size, folder):
    """A published configuration with patches of the tiny processor, without weights."""
    ids = family.token_ids(family.write_processor(folder))
    config = models.config_from_hf(published(family.name, size))
    vision = dataclasses.replace(config.vision, patch_size=4)
    tokens = {name: ids[name] for name in ("image_token_id", "video_token_id")}
    return LVLM({}, dataclasses.replace(config, vision=vision, **tokens), folder)


def test_conversations_of_pictures_of_different_sizes(tmp_path):
    model = published_with_processor(QWEN2_5_VL, "Qwen2.5-VL-3B-Instruct", tmp_path)
    generator = np.random.default_rng(2)
    pictures = [Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)) for size in ((40, 21), (17, 50))]
    messages = [[{"role": "user", "content": [{"type": "image", "image": picture}]}] for picture in pictures]
    prompt, patches = model.prepare(messages), 0
    for row, picture in enumerate(pictures):
        text = QWEN2_5_VL.chat.format(QWEN2_5_VL.marker)
        theirs = QWEN2_5_VL.processed(model.processor, [picture], text)
        np.testing.assert_array_equal(prompt.tokens[row][prompt.image_id[row] >= 0], theirs["input_ids"][0])
        np.testing.assert_array_equal(prompt.grids[row], theirs["image_grid_thw"][0, 1:] // 2)
        count = len(theirs["pixel_values"])
        np.testing.assert_array_equal(prompt.pixels[row, :count], theirs["pixel_values"])
        assert not prompt.pixels[row, count:].any() and prompt.geometry["valid"][row].sum() == count
        patches += count
    assert prompt.geometry["valid"].sum() == patches


def test_what_a_patch_holds(tmp_path):
    """Written out by hand: which row and column of a picture a patch is."""
    model = published_with_processor(QWEN2_VL, "Qwen2-VL-2B-Instruct", tmp_path)
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 21, 3), np.uint8))
    prompt = model.prepare([{"role": "user", "content": [{"type": "image", "image": picture}]}])
    first = model.processor.image_processor(picture, do_resize=True, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(first, prompt.pixels[0][: len(first)])
    coordinates = prompt.geometry["coordinates"][0][:6]
    np.testing.assert_array_equal(coordinates, [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3]])
