"""LLaVA against transformers on random checkpoints: logits and greedy tokens, alone and in padded batches."""

import numpy as np
import pytest
import torch

from lvlm_jax import LVLM
from tests import checkpoints
from tests.checkpoints import IMAGE
from tests.reference import llava

ALONE = [(4, IMAGE, 3, IMAGE, 6)]
PADDED = [(6,), (3, IMAGE, 5), (2, IMAGE, 4, IMAGE, 9)]
NEW_TOKENS = 64


@pytest.fixture(scope="module", params=list(checkpoints.VARIETIES))
def pair(request, tmp_path_factory):
    """(transformers' model, ours), loaded from the same folder."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = checkpoints.make_llava(folder, seed=11, **checkpoints.VARIETIES[request.param])
    return theirs, LVLM.from_pretrained(folder, dtype="float32")


def valid_rows(logits, mask, row):
    """Logits at the valid tokens of one left-padded row: its last tokens, whatever the padded length is."""
    return np.asarray(logits[row])[-int(mask[row].sum()) :]


@pytest.mark.parametrize("layouts", [ALONE, PADDED], ids=["alone", "padded"])
def test_logits(pair, layouts):
    theirs, ours = pair
    inputs = checkpoints.random_inputs(theirs.config, seed=5, layouts=layouts)
    with torch.no_grad():
        expected = theirs(**checkpoints.to_torch(inputs)).logits.numpy()
    logits = ours.logits(ours.prepare(inputs))
    assert expected.std() > 1
    for row in range(len(layouts)):
        got = valid_rows(logits, inputs["attention_mask"], row)
        want = valid_rows(expected, inputs["attention_mask"], row)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_prefill_and_decode_give_the_logits_of_one_pass(pair):
    """Cached steps after a padded prefill against the float64 reference, forced tokens."""
    theirs, ours = pair
    inputs = checkpoints.random_inputs(theirs.config, seed=6, layouts=PADDED)
    vocabulary = theirs.config.text_config.vocab_size
    forced = np.random.default_rng(7).integers(3, vocabulary - 1, (len(PADDED), 3))
    state, step = ours.prefill(ours.prepare(inputs), max_length=inputs["input_ids"].shape[1] + 8)
    steps = [step]
    for column in forced.T:
        state, step = ours.decode(state, column.astype(np.int32))
        steps.append(step)
    got = np.stack([np.asarray(step.main) for step in steps], axis=1)
    assert all(step.contrast is None for step in steps)
    np.testing.assert_array_equal(np.asarray(step.combined), np.asarray(step.main))
    weights, config = llava.from_torch(theirs)
    for row in range(len(PADDED)):
        sample = checkpoints.select(theirs.config, inputs, row)
        ids = np.concatenate([sample["input_ids"][0], forced[row]])
        want = llava.logits(weights, config, ids, sample.get("pixel_values"))[-4:]
        np.testing.assert_allclose(got[row], want, rtol=0, atol=1e-4)


def test_greedy_tokens(pair):
    theirs, ours = pair
    inputs = checkpoints.random_inputs(theirs.config, seed=8, layouts=PADDED)
    with torch.no_grad():
        expected = theirs.generate(
            **checkpoints.to_torch(inputs), max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True
        ).numpy()[:, -NEW_TOKENS:]
    out = ours.generate(inputs, max_new_tokens=NEW_TOKENS, temperature=0.0)
    np.testing.assert_array_equal(np.stack([np.asarray(tokens) for tokens in out.tokens]), expected)
    # A run stuck on one token would hide a wrong position or cache slot.
    distinct = [len(set(row)) for row in expected.tolist()]
    assert min(distinct) > 2 and max(distinct) > 12
