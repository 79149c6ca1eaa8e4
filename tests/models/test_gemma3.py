"""What Gemma 3's whole-image attention asks of the machinery, and what only its processor does."""

import jax
import numpy as np
import pytest

from lvlm_jax import LVLM, methods, models
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import branches
from lvlm_jax.training import forward as training
from tests.checkpoints import IMAGE
from tests.models.families.gemma3 import GEMMA3
from tests.models.test_published import published

ALONE = [(4, IMAGE, 3, IMAGE, 6)]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return GEMMA3.with_processor(tmp_path_factory.mktemp("processor"))


def arrays_of(ours, layouts):
    """Random arrays for the model with a processor, whose image token is another."""
    arrays = GEMMA3.inputs(GEMMA3.config(), 4, layouts)
    placeholder = GEMMA3.rest["image_token_index"]
    arrays["input_ids"][arrays["input_ids"] == placeholder] = ours.config.image_token_id
    return arrays


def test_a_shared_prefix_that_ends_inside_an_image_changes_nothing(ours):
    """The split lies 16 columns before the end of the prompt, where 10 tokens follow an image."""
    prompt = ours.prepare(arrays_of(ours, [(2, IMAGE, 3, IMAGE, 9), (30,)]))
    split = prompt.tokens.shape[1] - prompt.tail_rows
    assert (prompt.image_id[0, split - 1 : split + 1] == 2).all()
    forced = np.random.default_rng(3).integers(3, 117, (4, 2))
    states = [ours.prefill(prompt, methods.CMAC(), share_prefix=shared) for shared in (True, False)]
    assert (states[0][0].caches[0].prefix is not None) and states[1][0].caches[0].prefix is None
    for tokens in (None, *forced):
        if tokens is not None:
            states = [ours.decode(state, tokens.astype(np.int32)) for state, _ in states]
        (_, shared), (_, apart) = states
        assert np.abs(np.asarray(apart.main - apart.contrast)[0]).max() > 1e-2
        for name in ("main", "contrast"):
            np.testing.assert_allclose(getattr(shared, name), getattr(apart, name), rtol=0, atol=1e-4)


def test_the_forward_pass_of_training_sees_whole_images(ours):
    prompt = ours.prepare(arrays_of(ours, ALONE))
    main = branches.embed_prompt(ours.params, ours.config, prompt)
    module = models.build(ours.config)

    @jax.jit
    def logits(params):
        decoded = training.decode(module, params, main.image_id, main.embeddings)
        return module.apply({"params": params}, decoded.hidden[0], method="head")

    got, want = logits(ours.params), ours.logits(prompt)
    np.testing.assert_allclose(np.asarray(got)[:, -want.shape[1] :], want, rtol=0, atol=1e-4)


def test_images_encoded_ahead_stand_for_their_pictures(ours):
    picture = np.random.default_rng(1).integers(0, 256, (40, 24, 3), dtype=np.uint8)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": content}]
    prompt = ours.prepare(messages)
    (content[0]["image"],) = ours.encode_images([picture])
    again = ours.prepare(messages)
    np.testing.assert_array_equal(again.tokens, prompt.tokens)
    np.testing.assert_allclose(ours.logits(again), ours.logits(prompt), rtol=0, atol=1e-4)


def test_crops_count_as_images_unless_the_arrays_say_whose_they_are(ours):
    picture = np.random.default_rng(2).integers(0, 256, (30, 90, 3), dtype=np.uint8)
    scan = dict(do_pan_and_scan=True, pan_and_scan_min_crop_size=16, pan_and_scan_max_num_crops=3)
    scan |= dict(pan_and_scan_min_ratio_to_activate=1.2)
    arrays = ours.processor(images=[picture], text="<start_of_image>b", return_tensors="np", **scan)
    pixels = arrays["pixel_values"]
    assert len(pixels) == 4 and ours.prepare(arrays).image_id.max() == 4
    known = ours.prepare({**arrays, "num_crops": np.array([3])})
    assert known.image_id.max() == 1 and known.owner.tolist() == [0, 0, 0, 0]
    with pytest.raises(LVLMError, match="num_crops .* 3 rows of pixel_values, which has 4"):
        ours.prepare({**arrays, "num_crops": np.array([2])})


def test_bfloat16_parameters_and_published_layers(ours):
    params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), ours.params)
    arrays = arrays_of(ours, ALONE)
    half = np.asarray(LVLM(params, ours.config).logits(arrays), np.float32)
    assert np.corrcoef(half[0, -1], np.asarray(ours.logits(arrays))[0, -1])[0, 1] > 0.99
    text = models.config_from_hf(published("gemma3", "gemma-3-4b-it")).text
    assert text.layer_rope(5).factor == 8 and [text.window(layer) for layer in (4, 5)] == [1024, None]
