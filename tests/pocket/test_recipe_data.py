"""Batches of the pocket recipe: their content, and the tokens with a loss."""

import dataclasses

import jax
import numpy as np
import pytest

from lvlm_jax.pocket import recipe_data as pocket_data
from lvlm_jax.pocket import tokenizer
from lvlm_jax.pocket.catalogue import CATEGORIES, SCENE_NAMES

SINGLE, SEVERAL = pocket_data.Part(6, 256, 6), pocket_data.Part(2, 384, 7)
ENCODER = tokenizer.pocket_tokenizer()


@pytest.fixture(scope="module")
def conversations():
    return pocket_data.Conversations(5, ENCODER, SINGLE, SEVERAL)


@pytest.fixture(scope="module")
def batch(conversations):
    return conversations(0)


def equal(first, second):
    return jax.tree.all(jax.tree.map(np.array_equal, first, second))


def test_a_batch_holds_both_kinds_of_conversation(conversations, batch):
    image = ENCODER.convert_tokens_to_ids(tokenizer.IMAGE)
    assert equal(batch, conversations(0)) and not equal(batch, conversations(1))
    for name, part in (("single", SINGLE), ("several", SEVERAL)):
        rows = batch[name]
        assert rows["tokens"].shape == rows["answers"].shape == (part.rows, part.length)
        images = (rows["tokens"] == image).sum(axis=1) // tokenizer.IMAGE_TOKENS
        assert np.all(images == 1) if name == "single" else np.all(images >= 2)
        shown = rows["labels"][:, 0] >= 0
        assert shown.sum() == images.sum() <= part.images
        assert rows["images"][shown].any(axis=(1, 2, 3)).all() and not rows["images"][~shown].any()


def test_answers_and_nothing_else_carry_loss(batch):
    for tokens, answers in zip(batch["single"]["tokens"], batch["single"]["answers"], strict=True):
        whole = ENCODER.decode(tokens[tokens != ENCODER.pad_token_id])
        spoken = [turn.split("</s>")[0] for turn in whole.split(" ASSISTANT:")[1:]]
        assert ENCODER.decode(tokens[answers]).split("</s>")[:-1] == spoken


def test_labels_name_what_a_patch_shows():
    batch = pocket_data.Pictures(seed=0, batch=8)(0)
    assert batch["images"].dtype == np.uint8 and batch["images"].shape == (8, 96, 96, 3)
    background = batch["labels"] >= len(CATEGORIES)
    assert 0.3 < background.mean() < 0.95
    for labels, empty in zip(batch["labels"], background, strict=True):
        assert len(set(labels[empty])) == 1  # the one kind of place
    names, words = [*CATEGORIES, *SCENE_NAMES], pocket_data.label_words(ENCODER)
    # No two names begin with the same token.
    assert len(set(words)) == len(words) == len(names) == pocket_data.LABEL_COUNT
    assert ENCODER.decode(words[names.index("dog")]) == " dog"


def test_held_out_questions_ask_for_one_token():
    made = pocket_data.held_out(ENCODER, 12)
    assert set(made) == {"existence", "tempting", "choice", "counting", "position"}
    assert all(np.all(rows["answers"].sum(axis=1) == 1) for rows in made.values())
    spoken = made["existence"]["tokens"][made["existence"]["answers"]]
    assert {ENCODER.decode(token) for token in spoken} == {" Yes", " No"}


def test_drill_rows_ask_whether_which_and_where_beside_a_caption(conversations, batch):
    drilled = dataclasses.replace(conversations, drill=4)(0)
    words = {" Yes", " No", " left", " middle", " right", *(f" {name}" for name in CATEGORIES)}
    for tokens, answers in zip(drilled["single"]["tokens"][:4], drilled["single"]["answers"][:4], strict=True):
        spoken = ENCODER.decode(tokens[answers]).split("</s>")[:-1]
        captions = [answer for answer in spoken if answer not in words]
        assert len(spoken) >= 6 and len(captions) <= 1
        assert not captions or captions[0] in (spoken[0], spoken[-1])
    assert equal(drilled["several"], batch["several"])
    assert np.array_equal(drilled["single"]["tokens"][4:], batch["single"]["tokens"][4:])
    assert np.array_equal(drilled["single"]["images"], batch["single"]["images"])
