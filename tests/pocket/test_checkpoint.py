"""The shipped checkpoint: transformers agrees with it, and its answers about objects outside its world."""

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from lvlm_jax import LVLM
from lvlm_jax.pocket.scenes import render, scene_at
from lvlm_jax.weights import names
from tests.checkpoints import to_torch


@pytest.fixture(scope="module")
def pocket():
    return LVLM.from_pretrained(names.checkpoint("pocket"))


def asked(text, *images):
    shown = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


def test_transformers_loads_it_with_equal_logits_and_tokens(pocket):
    theirs = LlavaForConditionalGeneration.from_pretrained(pocket.folder, dtype=torch.float32).eval()
    scenes = [render(scene_at("test", index)) for index in range(3)]
    prompts = [
        asked("Please describe this image in detail.", scenes[0]),
        asked("Which image has a dog?", *scenes[1:]),
        asked("Hello."),
    ]
    prepared = pocket.prepare(prompts)
    valid = prepared.image_id >= 0
    inputs = {"input_ids": prepared.tokens.astype(np.int64), "attention_mask": valid.astype(np.int64)}
    inputs["pixel_values"] = prepared.pixels
    with torch.no_grad():
        expected = theirs(**to_torch(inputs)).logits.numpy()
        generated = theirs.generate(**to_torch(inputs), max_new_tokens=24, do_sample=False).numpy()
    np.testing.assert_allclose(np.asarray(pocket.logits(inputs))[valid], expected[valid], rtol=0, atol=1e-4)
    answers = pocket.generate(prompts, max_new_tokens=24)
    for ours, row in zip(answers.tokens, generated[:, inputs["input_ids"].shape[1] :], strict=True):
        assert ours == row[: len(ours)].tolist()


def test_it_answers_what_it_has_never_seen(pocket):
    noise = np.random.default_rng(0).integers(0, 256, (333, 517, 3), dtype=np.uint8)
    answers = pocket.generate([asked("¿Qué es la Crítica de la razón pura?", noise)], max_new_tokens=64)
    assert answers.text[0] and answers.finish_reason[0] == "stop"
