"""Towers of whole pictures and tiles: a few pictures at a time, attention by blocks, memory that does not grow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.generation import forward
from lvlm_jax.models import vision
from tests.compiler import optimised
from tests.models import zoo
from tests.slow import named

SLOW = (
    "smolvlm",
    "llava_next",
    "llava_onevision",
    "gemma3",
    "instructblip",
    "qwen_vl",
    "qwen2_vl",
    "qwen3_vl",
    "glm4v",
)


@pytest.mark.parametrize("name", named(["llava", "internvl", "qwen2_5_vl", *SLOW], SLOW))
def test_a_few_pictures_at_a_time_by_blocks(monkeypatch, tmp_path, name):
    """Tokens, the class token's attention on them, and gradients equal those of all images and patches at once."""
    case = zoo.load(name, tmp_path)
    config, params, prompt = case.model.config, case.model.params, case.prompt(0, 0, 2, 2)
    assert len(prompt.pixels) > 2
    geometry = jax.tree.map(jnp.asarray, prompt.geometry)
    count = int((prompt.image_id > 0).sum())  # behind them are tokens of filler

    def found():
        def tokens(pixels):
            return forward.encode_images(params, config, pixels, geometry).reshape(-1, config.text.hidden_size)

        pixels = jnp.asarray(prompt.pixels)
        seen = [jax.jit(lambda: tokens(pixels)[:count])()]
        seen += [jax.jit(jax.grad(lambda pixels: tokens(pixels)[:count].mean()))(pixels)]
        if name in ("llava", "internvl"):
            seen += [jax.jit(lambda: forward.salience(params, config, pixels, geometry)[:count])()]
        return seen

    want = found()
    monkeypatch.setattr(vision, "STREAM_FROM", 1)
    monkeypatch.setattr(vision, "CHUNK", 1)
    for one, other in zip(found(), want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_memory_is_that_of_a_few_pictures(monkeypatch, tmp_path):
    model = zoo.load("llava", tmp_path).model
    patches = model.config.vision.num_patches
    monkeypatch.setattr(vision, "CHUNK", 4 * patches)

    @functools.cache
    def temporary(count):
        side = model.config.vision.image_size
        pixels = jax.ShapeDtypeStruct((count, 3, side, side), jnp.float32)
        look = jax.jit(lambda pixels: forward.encode_images(model.params, model.config, pixels))
        return look.lower(pixels).compile().memory_analysis().temp_size_in_bytes

    own = patches * model.config.text.hidden_size * 4  # of a picture's tokens
    with optimised(True):
        assert temporary(32) - temporary(8) <= 24 * 1.1 * own
