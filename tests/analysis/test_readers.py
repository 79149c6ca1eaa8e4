"""Reading a model: the assembled attention, the sinks, the probe, against transformers and the plain NumPy model."""

import numpy as np
import pytest
import torch

from lvlm_jax import analysis
from lvlm_jax.analysis import readers
from lvlm_jax.attention import Tap
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import decode_loop
from lvlm_jax.methods import CMAC
from tests import checkpoints
from tests.reference import llava

ANSWER = [7, 30, 12, 55, 9]


@pytest.fixture(scope="module")
def prompt(torch_model):
    """One conversation with two images."""
    layouts = [(3, checkpoints.IMAGE, 2, checkpoints.IMAGE, 4)]
    return checkpoints.random_inputs(torch_model.config, seed=11, layouts=layouts)


@pytest.fixture(scope="module")
def attentions(torch_model, prompt):
    """transformers' attention [L, H, S, S] over the prompt and all of the answer but its last token."""
    ids = np.concatenate([prompt["input_ids"], [ANSWER[:-1]]], axis=1)
    arrays = prompt | {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    with torch.no_grad():
        out = torch_model(**checkpoints.to_torch(arrays), output_attentions=True)
    return torch.cat(out.attentions).numpy()


def test_mean_attention_is_that_of_generation(model, prompt, attentions):
    weights, image_id = analysis.mean_attention(model, prompt, ANSWER)
    valid = image_id[0] >= 0
    assert valid.sum() == attentions.shape[-1]
    found = weights[:, 0][:, valid][:, :, valid]
    np.testing.assert_allclose(found, attentions.mean(1), atol=2e-5)
    assert (weights[:, 0][:, valid][:, :, ~valid] == 0).all()
    np.testing.assert_array_equal(image_id[0][valid][-len(ANSWER) - 3 :], 0)
    assert set(image_id[0]) == {-1, 0, 1, 2}


def test_mean_attention_has_the_edits_of_a_method(model, prompt):
    method = CMAC(gamma=4.0)
    plain, image_id = analysis.mean_attention(model, prompt, ANSWER)
    edited, _ = analysis.mean_attention(model, prompt, ANSWER, method)
    end = np.flatnonzero(image_id[0] > 0)[-1] + 1
    np.testing.assert_allclose(edited[0, :, :end], plain[0, :, :end], atol=1e-6)
    assert np.abs(edited[:, :, end:] - plain[:, :, end:]).max() > 1e-3
    state, step = model.prefill(prompt, method, 96, tap=True)
    last = np.asarray(step.tapped.attention[:, 0, :, :, 0]).mean(2)
    row = edited[:, :, last.shape[-1] - 1, : last.shape[-1]]
    np.testing.assert_allclose(row, last, atol=1e-6)


def test_follow_gives_one_item_for_each_token_of_one_conversation(model, prompt, mixed):
    tap = Tap(layers=(1,), heads=(0, 2), hidden=(2,))
    items = list(analysis.follow(model, prompt, ANSWER, tap))
    assert [item.attention.shape[:5] for item in items] == [(1, 1, 1, 2, 1)] * len(ANSWER)
    assert [item.hidden.shape[:4] for item in items] == [(1, 1, 1, 1)] * len(ANSWER)
    assert list(analysis.follow(model, prompt, [], tap)) == []
    for use in (lambda *given: next(analysis.follow(*given, Tap())), analysis.with_answer):
        with pytest.raises(LVLMError, match="one conversation"):
            use(model, mixed, ANSWER)


@pytest.mark.parametrize("at_once", [1, 2**28])
def test_head_sinks_by_pieces(model, prompt, attentions, monkeypatch, at_once):
    monkeypatch.setattr(readers, "WEIGHTS_AT_ONCE", at_once)
    beta = 0.05
    found = analysis.head_sinks(model, prompt, beta)[:, 0]
    is_image = (prompt["input_ids"][0] == model.config.image_token_id).nonzero()[0]
    image = {place: number // model.config.tokens_per_image for number, place in enumerate(is_image)}
    expected = np.zeros(found.shape)
    for column in is_image:
        rows = [place for place in is_image if place > column and image[place] == image[column]]
        if rows:
            expected += attentions[:, :, rows, column].mean(-1) > beta
    np.testing.assert_allclose(found, expected / len(is_image), atol=1e-6)
    assert 0 < found.mean() < 1


def hidden_from(weights, config, ids, pixels, from_layer):
    """Logits [T, V] of the plain NumPy model when text rows do not see images from a layer on."""
    text = config["text_config"]
    hidden, positions = llava.embed(weights, config, ids, pixels), np.arange(len(ids))
    is_image = ids == config["image_token_index"]
    for layer in range(text["num_hidden_layers"]):
        q, k, v = llava.project(weights, config, layer, hidden)
        seen = llava.visible(config, layer, positions, positions)
        if layer >= from_layer:
            seen = seen & ~(~is_image[:, None] & is_image[None, :])
        z = np.where(seen, llava.scores(text, q, k, positions, positions), -np.inf)
        v = np.repeat(v, q.shape[0] // v.shape[0], axis=0)
        mixed = np.einsum("HTS,HSD->HTD", llava.softmax(z), v)
        hidden = llava.finish_layer(weights, config, layer, hidden, mixed)
    return llava.head(weights, config, hidden)


def test_masking_probe(model, torch_model, prompt, all_programs_kept):
    rows = 6
    before = decode_loop.full_forward._cache_size()
    probe = analysis.masking_probe(model, prompt, rows=rows)
    assert decode_loop.full_forward._cache_size() <= before + 1  # one program for all layers
    weights, config = llava.from_torch(torch_model)
    ids, pixels = prompt["input_ids"][0], prompt["pixel_values"].astype(np.float64)
    plain = llava.softmax(llava.logits(weights, config, ids, pixels)[-rows:])
    for layer in range(2):
        hidden = llava.softmax(hidden_from(weights, config, ids, pixels, layer)[-rows:])
        mean = (plain + hidden) / 2
        expected = 0.5 * (plain * np.log(plain / mean) + hidden * np.log(hidden / mean)).sum(-1)
        np.testing.assert_allclose(probe[layer, 0], expected, atol=1e-4)
    assert probe[0].max() > 0.01
    # Hiding behind the last layer is bit-equal to nothing.
    np.testing.assert_array_equal(model.logits(prompt, analysis.HideImages(from_layer=2)), model.logits(prompt))
    with pytest.raises(LVLMError, match="rows is 400"):
        analysis.masking_probe(model, prompt, rows=400)


def test_with_answer(model, prompt):
    answered = analysis.with_answer(model, prompt, ANSWER)
    kept = answered.tokens[answered.image_id >= 0]
    np.testing.assert_array_equal(kept, [*prompt["input_ids"][0], *ANSWER])
    np.testing.assert_array_equal(answered.pixels, prompt["pixel_values"])
