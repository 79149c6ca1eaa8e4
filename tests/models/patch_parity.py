"""What the tests of families with loose patches and multimodal positions check against transformers."""

import jax
import numpy as np
import torch

from lvlm_jax import LVLM
from lvlm_jax.generation import drivers
from lvlm_jax.weights.save import save_checkpoint
from lvlm_jax.weights.tables import table_for
from tests import checkpoints
from tests.models import grid_checkpoints
from tests.models.grid_checkpoints import valid_rows

NEW_TOKENS = 32
ATOL = 1e-4

# Numbers are text tokens, pairs rows and columns of patches: upright, lying, both, none, and a padded batch.
LAYOUTS = {
    "portrait": [(4, (12, 6), 5)],
    "landscape": [(4, (6, 12), 5)],
    "two": [(2, (6, 12), 3, (12, 6), 4)],
    "text": [(9,)],
    "padded": [(6,), (3, (6, 12), 5), (2, (6, 6), 4, (12, 6), 7)],
}


def inputs_of(theirs, layouts, seed=5):
    return grid_checkpoints.random_inputs(theirs.config, seed, layouts)


def their_logits(theirs, inputs):
    # transformers keeps what it knows of positions from one call to the next.
    theirs.model.rope_deltas = None
    with torch.no_grad():
        return theirs(**checkpoints.to_torch(inputs)).logits.numpy()


def assert_equal_logits(theirs, ours, layouts, atol=ATOL):
    inputs = inputs_of(theirs, layouts)
    expected = their_logits(theirs, inputs)
    logits = ours.logits(ours.prepare(inputs))
    assert expected.std() > 1
    for row in range(len(layouts)):
        got = valid_rows(logits, inputs["attention_mask"], row)
        want = valid_rows(expected, inputs["attention_mask"], row)
        np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=f"sample {row}")


def assert_equal_positions(theirs, ours, layouts):
    """Positions along the three axes, and what is added to the number of a later token."""
    inputs = inputs_of(theirs, layouts)
    prompt = ours.prepare(inputs)
    tensors = checkpoints.to_torch(inputs)
    tensors.pop("pixel_values")
    positions, deltas = theirs.model.get_rope_index(**tensors)
    for row, length in enumerate(prompt.lengths):
        kept = inputs["attention_mask"][row].astype(bool)
        np.testing.assert_array_equal(prompt.axes[:, row, -length:], positions[:, row, kept].numpy())
    state, _ = ours.prefill(prompt)
    np.testing.assert_array_equal(np.asarray(state.position), prompt.lengths + deltas[:, 0].numpy())


def assert_equal_greedy_tokens(theirs, ours, layouts):
    inputs = inputs_of(theirs, layouts, seed=8)
    theirs.model.rope_deltas = None
    with torch.no_grad():
        expected = theirs.generate(
            **checkpoints.to_torch(inputs), max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True
        ).numpy()[:, -NEW_TOKENS:]
    out = ours.generate(inputs, max_new_tokens=NEW_TOKENS, temperature=0.0)
    np.testing.assert_array_equal(np.stack([np.asarray(tokens) for tokens in out.tokens]), expected)
    # A run stuck on one token would hide a wrong position or cache slot.
    assert max(len(set(row)) for row in expected.tolist()) > 8


def assert_cached_decoding_equals_one_pass(theirs, ours, layouts, steps=4):
    inputs = inputs_of(theirs, layouts, seed=6)
    forced = np.random.default_rng(7).integers(
        3, theirs.config.text_config.vocab_size - 4, (len(layouts), steps)
    )
    state, step = ours.prefill(ours.prepare(inputs), max_length=inputs["input_ids"].shape[1] + steps + 1)
    found = [step.main]
    for column in forced.T:
        state, step = ours.decode(state, column.astype(np.int32))
        found.append(step.main)
    whole = inputs | {
        "input_ids": np.concatenate([inputs["input_ids"], forced], axis=1),
        "attention_mask": np.pad(inputs["attention_mask"], ((0, 0), (0, steps)), constant_values=1),
    }
    expected = np.asarray(ours.logits(ours.prepare(whole)))[:, -steps - 1 :]
    np.testing.assert_allclose(np.stack(found, axis=1), expected, rtol=0, atol=ATOL)


def assert_saved_model_loads_in_transformers(theirs, ours, folder, layouts):
    ours.save_pretrained(folder)
    model, report = type(theirs).from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    inputs = inputs_of(theirs, layouts)
    np.testing.assert_allclose(
        their_logits(model.float().eval(), inputs), their_logits(theirs, inputs), rtol=0, atol=ATOL
    )


def assert_every_naming_scheme_loads(ours, folder):
    for scheme in table_for(ours.config).schemes:
        save_checkpoint(folder / scheme, ours.params, ours.config, scheme=scheme)
        loaded = LVLM.from_pretrained(folder / scheme)
        jax.tree.map(np.testing.assert_array_equal, loaded.params, ours.params)


def assert_batched_image_tokens_equal_single(ours, theirs, layouts):
    """The padding of a bucket and the other images of a batch never reach an image's tokens."""
    inputs = inputs_of(theirs, layouts)
    prompt = ours.prepare(inputs)
    tokens = encoded(ours, prompt)
    start = taken = 0
    for grid in inputs["image_grid_thw"]:
        patches = int(grid.prod())
        alone = ours.config.pictures(
            [
                {
                    "pixel_values": inputs["pixel_values"][start : start + patches],
                    "image_grid_thw": grid[None],
                }
            ],
            [],
        )
        count = int(alone.token_counts[0])
        np.testing.assert_allclose(
            tokens[taken : taken + count], encoded(ours, alone)[:count], rtol=0, atol=1e-5
        )
        start, taken = start + patches, taken + count
    assert start == len(inputs["pixel_values"])


def encoded(ours: LVLM, pictures) -> np.ndarray:
    return np.asarray(
        drivers.encode_images(ours.params, ours.config, pictures.pixels, pictures.geometry), np.float32
    )
