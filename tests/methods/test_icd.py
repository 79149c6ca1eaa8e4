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
    compare.assert_contrastive(compare.load(2, "bare"), method, icd.run, factor, layouts, words=WORDS, **settings)


def test_words_take_the_place_of_the_system_prompt():
    """Prefill and cached steps: a system prompt inside the first text, one that opens the prompt, and none."""
    case, spans = compare.load(2, "bare"), [(1, 3), (0, 4), (0, 0)]
    prompt = case.ours.prepare(case.inputs(MIXED))
    padding = prompt.tokens.shape[1] - prompt.lengths
    prompt = dataclasses.replace(prompt, system=np.asarray(spans) + padding[:, None])
    main, contrast, combined = compare.run_library(case.ours, prompt, case.forced(MIXED), ICD(tokens=WORDS))
    each = iter(spans)
    wanted = case.references(lambda *sample: icd.run(*sample, words=WORDS, system=next(each)), MIXED)
    before = case.library(MIXED, ICD(tokens=WORDS))[1]  # no system prompt is known
    for row, want in enumerate(wanted):
        compare.assert_close(main[row], want[0], f"main {row}")
        compare.assert_close(contrast[row], want[1], f"contrast {row}")
        compare.assert_combined(combined[row], want[2], want[3], 3)
        assert (np.abs(contrast[row] - before[row]).max() > 0.05) == (spans[row] != (0, 0))


def test_a_text_takes_the_place_of_a_system_message(model):
    """Messages say what the system prompt is; the conversation without one has the sentence in front."""
    system = {"role": "system", "content": "Be brief. "}
    bare = small.conversation("Is it red?", seed=1)
    prompt = model.prepare([[system, *bare], bare])
    words = model.processor.tokenizer("Confused? ", add_special_tokens=False)["input_ids"]
    _, step = model.prefill(prompt, ICD(tokens=tuple(words)))
    length = len(model.processor.tokenizer("Be brief.", add_special_tokens=False)["input_ids"])
    for row in range(2):
        ids = prompt.tokens[row][prompt.image_id[row] >= 0]
        first = int(ids[0] == 1)  # <s>
        span = (first, first + length) if row == 0 else None
        disturbed = {
            "input_ids": np.array([icd.disturbed(ids.tolist(), words, span, model.config.bos_token_id)]),
            "pixel_values": prompt.pixels[row : row + 1],
        }
        np.testing.assert_allclose(step.contrast[row], model.logits(disturbed)[0, -1], rtol=0, atol=1e-4)
    assert np.abs(np.asarray(step.contrast[0] - step.contrast[1])).max() > 0.05


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
    disturbed = {"input_ids": np.array([[1, *words, *valid[1:]]]), "pixel_values": prompt.pixels}
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
