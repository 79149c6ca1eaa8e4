"""ICD through the public face against its NumPy reference."""

import dataclasses

import numpy as np
import pytest

from lvlm_jax import LVLM
from lvlm_jax.methods.icd import DISTURBANCE, ICD
from tests import small
from tests.methods import compare
from tests.methods.compare import EDGES, MIXED
from tests.reference import icd

WORDS = (17, 5, 44, 90, 23)


@pytest.mark.parametrize("settings", [{}, {"alpha": 2.0, "beta": 0.3}], ids=["default", "strong"])
@pytest.mark.parametrize("layouts", [MIXED, EDGES], ids=["mixed", "edges"])
def test_equals_the_reference(settings, layouts):
    method = ICD(tokens=WORDS, **settings)
    factor = 1 + 2 * float(method.alpha)
    compare.assert_contrastive(
        compare.load(2, "bare"), method, icd.run, factor, layouts, words=WORDS, **settings
    )


def test_a_text_stands_behind_the_first_token(model):
    """The contrast branch of a conversation is the prompt with the sentence right after its BOS token."""
    assert DISTURBANCE == (
        "You are a confused objects detector to provide a fuzzy overview or impression of the image."
    )
    model = LVLM(model.params, dataclasses.replace(model.config, bos_token_id=1), model.folder)
    method = ICD(prompt="Confused?")
    prompt = model.prepare([small.conversation("Is it red?", seed=1)])
    valid = prompt.tokens[0][prompt.image_id[0] >= 0]
    assert valid[0] == 1  # BOS
    words = model.processor.tokenizer("Confused?", add_special_tokens=False)["input_ids"]
    disturbed = {
        "input_ids": np.array([[1, *words, *valid[1:]]]),
        "pixel_values": prompt.pixels,
    }
    _, step = model.prefill(prompt, method)
    expected = model.logits(disturbed)[:, -1]
    np.testing.assert_allclose(step.contrast, expected, rtol=0, atol=1e-4)
    assert np.abs(np.asarray(step.main) - expected).max() > 0.05


def test_other_words_make_another_branch():
    case = compare.load(2, "bare")
    first = case.library(MIXED, ICD(tokens=WORDS))
    second = case.library(MIXED, ICD(tokens=list(WORDS[:3])))
    np.testing.assert_array_equal(first[0], second[0])
    assert np.abs(first[1] - second[1]).max() > 0.05
