"""Token layout: padding, image numbers, windows, and what is refused."""

import numpy as np
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from lvlm_jax.errors import LVLMError
from lvlm_jax.processors.layout import bucket
from tests import checkpoints, small
from tests.checkpoints import IMAGE
from tests.small import CONTEXT, IMAGE_TOKEN_ID, IMAGE_TOKENS


@pytest.fixture
def prompts(torch_model):
    """prompts(*layouts, seed=0): arrays of random prompts."""
    return lambda *layouts, seed=0: checkpoints.random_inputs(torch_model.config, seed, layouts)


def valid(arrays, row):
    return arrays["input_ids"][row, arrays["attention_mask"][row].astype(bool)]


def right_padded(arrays):
    """The same prompts, padded on the other side."""
    flipped = dict(arrays)
    for name in ("input_ids", "attention_mask"):
        lengths = arrays["attention_mask"].sum(axis=1)
        rows = zip(arrays[name], lengths, strict=True)
        flipped[name] = np.stack([np.roll(row, int(length)) for row, length in rows])
    return flipped


def test_prompts_end_at_the_last_column(model, mixed):
    prompt = model.prepare(mixed)
    assert prompt.tokens.shape == prompt.image_id.shape == (3, 64)
    for row, length in enumerate([4 + 16 + 3, 9, 2 + 16 + 1 + 16 + 6]):
        np.testing.assert_array_equal(prompt.tokens[row, -length:], valid(mixed, row))
        assert (prompt.image_id[row, :-length] == -1).all() and (prompt.image_id[row, -length:] >= 0).all()
        assert (prompt.tokens[row, :-length] == model.config.pad_token_id).all()
        assert prompt.lengths[row] == length


def test_columns_and_windows_come_in_buckets(model, prompts):
    """`tail_rows` holds all rows after the last image of the batch's longest."""
    for length, columns in ((1, 64), (64, 64), (65, 96), (CONTEXT - 1, 96)):
        assert model.prepare(prompts((length,))).tokens.shape == (1, columns)
    for layouts, tail_rows in (
        ([(5,)], 16),  # nothing comes after an image
        ([(IMAGE, 16)], 16),
        ([(IMAGE, 17)], 32),
        ([(40, IMAGE, 2), (IMAGE, 33)], 64),
        ([(IMAGE, 2, IMAGE, 3)], 16),
        ([(2, IMAGE)], 16),
    ):
        assert model.prepare(prompts(*layouts)).tail_rows == tail_rows
    with pytest.raises(LVLMError, match="has 96 tokens and the model's context is 96"):
        model.prepare(prompts((CONTEXT,)))


def test_pictures_of_any_size_make_few_programs():
    """Prompts of 500 pictures, each with a question of another length: what decides on prefill and on decode."""
    generator = np.random.default_rng(0)
    sides = np.exp(generator.uniform(np.log(45), np.log(8000), (500, 2))).astype(int)
    grids = [smart_resize(*side.tolist(), factor=28, min_pixels=56**2, max_pixels=28**2 * 16384) for side in sides]
    lengths = [height * width // 28**2 + int(generator.integers(12, 60)) for height, width in grids]
    assert max(lengths) > 16384 and min(lengths) < 80
    prompts = {bucket(length) for length in lengths}
    assert len(prompts) <= 20 and len({bucket(columns + bucket(100)) for columns in prompts}) <= 20
    assert all(length <= bucket(length) for length in lengths)
    assert all(1 - length / bucket(length) <= 1 / 3 for length in range(64, 40000))


def test_images_are_numbered_within_each_sample(model, mixed, prompts):
    image_id = model.prepare(mixed).image_id
    one, two = [1] * IMAGE_TOKENS, [2] * IMAGE_TOKENS
    np.testing.assert_array_equal(image_id[0], [-1] * 41 + [0] * 4 + one + [0] * 3)
    np.testing.assert_array_equal(image_id[1], [-1] * 55 + [0] * 9)
    np.testing.assert_array_equal(image_id[2], [-1] * 23 + [0] * 2 + one + [0] + two + [0] * 6)
    side_by_side = model.prepare(prompts((IMAGE, IMAGE, 1))).image_id[0]
    np.testing.assert_array_equal(side_by_side, [-1] * 31 + one + two + [0])


def test_the_side_of_the_padding(model, mixed):
    """Source columns lead back to what was given, and logits do not depend on it."""
    found = []
    for arrays in (mixed, right_padded(mixed)):
        prompt, mask = model.prepare(arrays), arrays["attention_mask"].astype(bool)
        assert prompt.source_columns.shape == mask.shape
        tokens = np.take_along_axis(prompt.tokens, prompt.source_columns, axis=1)
        np.testing.assert_array_equal(tokens[mask], arrays["input_ids"][mask])
        held = np.take_along_axis(prompt.image_id, prompt.source_columns, axis=1) >= 0
        np.testing.assert_array_equal(held, mask)
        logits = model.logits(arrays)
        assert logits.shape == (*mask.shape, model.config.text.vocab_size)
        found.append(np.asarray(logits)[mask])
    np.testing.assert_array_equal(*found)
    assert np.ptp(found[0], axis=0).min() > 0.1


def test_what_no_mask_shows_holds_no_token(model, mixed, prompts):
    """A hole in a mask; under padding -100 is a common filler; and what is prepared stays what it is."""
    arrays = prompts((8,))
    arrays["attention_mask"][0, 3] = 0
    prompt = model.prepare(arrays)
    np.testing.assert_array_equal(prompt.tokens[0, -7:], np.delete(arrays["input_ids"][0], 3))
    assert prompt.lengths[0] == 7 and model.prepare(prompt) is prompt
    filled = np.where(mixed["attention_mask"] == 0, -100, mixed["input_ids"])
    np.testing.assert_array_equal(model.prepare(mixed | {"input_ids": filled}).tokens, model.prepare(mixed).tokens)


def test_placeholders_are_expanded(model, mixed):
    rows = []
    for row in range(3):
        ids, kept, images = valid(mixed, row).tolist(), [], 0
        while ids:
            kept.append(ids.pop(0))
            if kept[-1] == IMAGE_TOKEN_ID:
                del ids[: IMAGE_TOKENS - 1]
                images += 1
        rows.append(np.asarray(kept))
        assert images == small.MIXED[row].count(IMAGE)
    short = checkpoints.padded(rows) | {"pixel_values": mixed["pixel_values"]}
    expanded, whole = model.prepare(short), model.prepare(mixed)
    for name in ("tokens", "image_id", "pixels", "source_columns"):
        np.testing.assert_array_equal(getattr(expanded, name), getattr(whole, name), err_msg=name)


def put(array, place, value):
    array = np.array(array)
    array[place] = value
    return array


SPOILED = [
    (lambda a: {"pixel_values": a["pixel_values"][:2]}, "3 image placeholders and 2 images"),
    (lambda a: {"pixel_values": None}, "image tokens, which do not fill whole images: the 0 images"),
    (lambda a: {"pixel_values": np.repeat(a["pixel_values"], 2, 0)}, "3 image placeholders and 6 images"),
    (lambda a: {"input_ids": put(a["input_ids"], (0, -4), 7)}, "15 image tokens.*do not truncate"),
    (lambda a: {"pixel_values": put(a["pixel_values"], (1, 0, 0, 0), np.nan)}, "NaN or infinite"),
    (lambda a: {"pixel_values": put(a["pixel_values"], (1, 0, 0, 0), -np.inf)}, "NaN or infinite"),
    (lambda a: {"pixel_values": a["pixel_values"][..., :14]}, r"expected \[images, 3, 28, 28\]"),
    (lambda a: {"pixel_values": a["pixel_values"].transpose(0, 2, 3, 1)}, r"shape \(3, 28, 28, 3\)"),
    (lambda a: {"input_ids": put(a["input_ids"], (1, -1), 260)}, "holds 260; expected 0 to 259"),
    (lambda a: {"input_ids": put(a["input_ids"], (1, -1), -5)}, "holds -5"),
    (lambda a: {"attention_mask": a["attention_mask"][:, 1:]}, r"attention_mask has shape \(3, 40\)"),
    (lambda a: {"attention_mask": put(a["attention_mask"], 1, 0)}, "sample 1 .* has no tokens"),
    (lambda a: {"input_ids": a["input_ids"].astype(float)}, "whole numbers"),
    (lambda a: {"input_ids": a["input_ids"][0]}, r"shape \(41,\)"),
    (lambda a: {"input_ids": None}, "input_ids is missing"),
]


def test_arrays_that_cannot_be_used(model, mixed):
    """None leaves an array out."""
    for change, message in SPOILED:
        changed = {name: array for name, array in (mixed | change(mixed)).items() if array is not None}
        with pytest.raises(LVLMError, match=message) as raised:
            model.prepare(changed)
        assert "\n" not in str(raised.value)
