import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from lvlm_jax import models
from lvlm_jax.models.pictures import whole_pictures
from lvlm_jax.pocket import recipe as pocket
from lvlm_jax.pocket import recipe_losses as sft
from lvlm_jax.pocket import tokenizer
from lvlm_jax.processors.layout import lay_out


@pytest.fixture(scope="module")
def tiny():
    """A small untrained model of the pocket family and its module."""
    settings = ConfigDict(
        {
            "vision_feature_layer": -1,
            "text": dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
            "vision": dict(hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2),
        }
    )
    config = models.config_from_hf(pocket.hf_config(settings, tokenizer.pocket_tokenizer()))
    return models.build(config), pocket.initial_parameters(config, 0)


def rows(config, lengths, images, width):
    """Right-padded random rows, the first 3 tokens text, then `images` placeholders blocks, then text."""
    rng = np.random.default_rng(0)
    tokens = np.full((len(lengths), width), config.pad_token_id, np.int32)
    for row, length in enumerate(lengths):
        tokens[row, :length] = rng.integers(5, 1000, length)
        tokens[row, 3 : 3 + 64 * images[row]] = config.image_token_id
    return tokens, rng.integers(0, 255, (sum(images), 96, 96, 3), dtype=np.uint8)


@functools.partial(jax.jit, static_argnums=0)
def logits(module, params, tokens, images):
    return sft.next_token_logits(module, params, tokens, sft.encode(module, params, images))


def test_padding_after_a_row_changes_nothing(tiny):
    module, params = tiny
    tokens, images = rows(module.config, [90], [1], 90)
    padded = np.concatenate([tokens, np.full((1, 20), module.config.pad_token_id)], axis=1)
    plain = logits(module, params, tokens, images)
    np.testing.assert_allclose(logits(module, params, padded, images)[:, :90], plain, atol=1e-5)


def test_images_go_to_their_rows_in_reading_order(tiny):
    module, params = tiny
    tokens, images = rows(module.config, [80, 150], [1, 2], 150)
    together = logits(module, params, tokens, images)
    first = logits(module, params, tokens[:1, :80], images[:1])
    second = logits(module, params, tokens[1:], images[1:])
    np.testing.assert_allclose(together[0, :80], first[0], atol=1e-5)
    np.testing.assert_allclose(together[1], second[0], atol=1e-5)
    swapped = logits(module, params, tokens[1:], images[[2, 1]])
    assert np.abs(swapped - second)[0, 130:].max() > 1e-3


def test_image_numbers_are_those_of_generation(tiny):
    module, _ = tiny
    config = module.config
    tokens, _ = rows(config, [192], [2], 192)
    laid = lay_out(
        [tokens[0]],
        [np.arange(192)],
        192,
        whole_pictures(np.zeros((2, 3, 96, 96), np.float32), 64),
        config.image_token_id,
        config.pad_token_id,
        1024,
    )
    image_id = sft.image_id_of(jnp.asarray(tokens), config.image_token_id, 64)
    np.testing.assert_array_equal(image_id, laid.image_id)


def test_pixels_are_those_of_the_processor():
    image = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    expected = tokenizer.build_processor().image_processor(image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(sft.pixels(jnp.asarray(image[None])), expected, atol=1e-5)


def test_only_answers_have_a_gradient(tiny):
    module, params = tiny
    tokens, images = rows(module.config, [90], [1], 90)
    answers = np.zeros((1, 90), bool)
    answers[0, 80:84] = True

    @jax.jit
    def loss(params, tokens):
        return sft.metrics(
            module, params, {"tokens": tokens, "answers": jnp.asarray(answers), "images": jnp.asarray(images)}
        )["loss"].value

    value = loss(params, jnp.asarray(tokens))
    later = tokens.copy()
    later[0, 84:] = 7
    assert loss(params, jnp.asarray(later)) == value
    changed = tokens.copy()
    changed[0, 83] = 7
    assert loss(params, jnp.asarray(changed)) != value
    gradient = jax.jit(jax.grad(loss))(params, jnp.asarray(tokens))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient["connector"]))
