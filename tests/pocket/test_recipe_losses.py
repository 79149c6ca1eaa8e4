import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from lvlm_jax import LVLM, models
from lvlm_jax.methods import CAPL, VAF
from lvlm_jax.pocket import recipe as pocket
from lvlm_jax.pocket import recipe_losses as sft
from lvlm_jax.pocket import tokenizer

TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
VISION = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)


@pytest.fixture(scope="module")
def tiny():
    """A small untrained model of the pocket family."""
    settings = ConfigDict({"vision_feature_layer": -1, "text": TEXT, "vision": VISION})
    config = models.config_from_hf(pocket.hf_config(settings, tokenizer.pocket_tokenizer()))
    return LVLM(pocket.initial_parameters(config, 0), config)


def rows(config, lengths, images, width):
    """Right-padded random rows, the first 3 tokens text, then `images` placeholders blocks, then text."""
    rng = np.random.default_rng(0)
    tokens = np.full((len(lengths), width), config.pad_token_id, np.int32)
    for row, length in enumerate(lengths):
        tokens[row, :length] = rng.integers(5, 1000, length)
        tokens[row, 3 : 3 + 64 * images[row]] = config.image_token_id
    return tokens, jnp.asarray(rng.integers(0, 255, (sum(images), 96, 96, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "method",
    [None, CAPL(rho=0.6), pytest.param(VAF(layers=(0,)), marks=pytest.mark.slow)],
    ids=["plain", "capl", "vaf"],
)
def test_rows_have_the_logits_of_generation(tiny, method):
    """Images go to their rows in reading order, and padding changes nothing."""
    module, lengths = models.build(tiny.config), np.array([80, 150])
    tokens, images = rows(tiny.config, lengths, [1, 2], 150)
    valid = np.arange(150) < lengths[:, None]
    inputs = {"input_ids": tokens, "attention_mask": valid, "pixel_values": np.asarray(sft.pixels(images))}
    encoded = sft.encode(module, tiny.params, images)
    found = jax.jit(lambda *given: sft.next_token_logits(module, *given, method))(tiny.params, tokens, encoded)
    expected = np.asarray(tiny.logits(inputs, method))
    np.testing.assert_allclose(found[valid], expected[valid], rtol=0, atol=1e-5)
    swapped = np.asarray(tiny.logits(inputs | {"pixel_values": inputs["pixel_values"][[0, 2, 1]]}, method))
    assert np.abs(swapped - expected)[1, 130:].max() > 1e-3


def test_pixels_are_those_of_the_processor():
    image = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    expected = tokenizer.build_processor().image_processor(image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(sft.pixels(jnp.asarray(image[None])), expected, atol=1e-5)


def test_only_answers_have_a_gradient(tiny):
    module = models.build(tiny.config)
    tokens, images = rows(tiny.config, [90], [1], 90)
    batch = {"answers": (np.arange(90) >= 80)[None] & (np.arange(90) < 84), "images": images}

    @jax.jit
    @jax.value_and_grad
    def loss(params, tokens):
        return sft.metrics(module, params, batch | {"tokens": tokens})["loss"].value

    later, changed = tokens.copy(), tokens.copy()
    later[0, 84:] = changed[0, 83] = 7
    (value, gradient), (same, _), (other, _) = (loss(tiny.params, one) for one in (tokens, later, changed))
    assert same == value != other
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient["connector"]))
