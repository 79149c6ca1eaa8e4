"""Small random checkpoints of the models that cut images into tiles, and padded inputs for them."""

import numpy as np
import torch
from transformers import AutoConfig

from tests import checkpoints, small

TILE = 8  # pixels

# Heights and widths in pixels; each fills another part of another resolution.
LANDSCAPE, PORTRAIT, SQUARE = (10, 26), (29, 12), (9, 9)

ONE = [(3, LANDSCAPE, 5)]
TWO = [(4, PORTRAIT, 3, LANDSCAPE, 6)]
TEXT = [(11,)]
PADDED = [(6,), (3, LANDSCAPE, 5), (2, PORTRAIT, 4, SQUARE, 9)]


def text_config(**overrides):
    """A tiny decoder without an end-of-sequence token; its last token stands for images."""
    fields = {
        "model_type": "llama",
        "vocab_size": small.IMAGE_TOKEN_ID + 1,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        **overrides,
    }
    return AutoConfig.for_model(**fields)


def vision_config(model_type, **overrides):
    """A tiny tower over tiles of 4 x 4 patches."""
    fields = {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": TILE,
        "patch_size": 2,
        **overrides,
    }
    return AutoConfig.for_model(**fields)


def make(model_class, config, folder, seed):
    """A random float32 model of transformers, saved to a folder."""
    config._attn_implementation = "eager"
    model = model_class(config).float().eval()
    checkpoints.randomize(model, seed)
    model.save_pretrained(folder)
    return model


def random_inputs(model, seed, layouts, together=False):
    """Left-padded arrays for a batch whose prompts are drawn at random.

    Args:
        model: transformers' own, which says how many tiles and tokens an image takes.
        seed: of tokens and pixels.
        layouts: one tuple per sample; an integer stands for that many text tokens, a pair for an image of that size.
        together: say which images come together (`batch_num_images`).

    Returns:
        NumPy arrays: input_ids and attention_mask [B, S], and where there are images pixel_values
        [I, tiles, 3, Y, X] and image_sizes [I, 2].
    """
    generator = np.random.default_rng(seed)
    sizes = [part for layout in layouts for part in layout if isinstance(part, tuple)]
    images, lengths = {}, iter(())
    if sizes:
        tiles = 1 + max(h * w for h, w in model.config.image_grid_pinpoints) // TILE**2
        images["pixel_values"] = generator.normal(size=(len(sizes), tiles, 3, TILE, TILE)).astype(np.float32)
        images["image_sizes"] = np.array(sizes)
        if together:
            counts = [sum(isinstance(part, tuple) for part in layout) for layout in layouts]
            images["batch_num_images"] = np.array([count for count in counts if count])
        with torch.no_grad():
            tokens = model.get_image_features(**checkpoints.to_torch(images), return_dict=True).pooler_output
        lengths = iter([len(one) for one in tokens])
    rows = []
    for layout in layouts:
        parts = [
            np.full(next(lengths), model.config.image_token_index)
            if isinstance(part, tuple)
            else generator.integers(3, model.config.text_config.vocab_size - 1, part)
            for part in layout
        ]
        rows.append(np.concatenate(parts))
    longest = max(map(len, rows))
    ids = np.stack([np.pad(row, (longest - len(row), 0)) for row in rows]).astype(np.int64)
    mask = np.stack([np.arange(longest) >= longest - len(row) for row in rows]).astype(np.int64)
    return {"input_ids": ids, "attention_mask": mask, **images}


def assert_same_logits(theirs, ours, inputs, logits=None):
    """Our logits are transformers' at every valid token."""
    with torch.no_grad():
        expected = theirs(**checkpoints.to_torch(inputs)).logits.numpy()
    logits = np.asarray(ours.logits(inputs)) if logits is None else logits
    assert expected.std() > 1
    valid = inputs["attention_mask"].astype(bool)
    np.testing.assert_allclose(logits[valid], expected[valid], rtol=0, atol=1e-4)


def assert_same_greedy_tokens(theirs, ours, inputs, count=32):
    """`count` greedy tokens are transformers'."""
    with torch.no_grad():
        expected = theirs.generate(**checkpoints.to_torch(inputs), max_new_tokens=count, do_sample=False)
    expected = expected.numpy()[:, -count:]
    out = ours.generate(inputs, max_new_tokens=count, temperature=0.0)
    np.testing.assert_array_equal(np.stack([np.asarray(tokens) for tokens in out.tokens]), expected)
    assert min(len(set(row)) for row in expected.tolist()) > 2  # else a wrong position would go unseen


def assert_cached_steps_give_one_pass(ours, inputs, forced):
    """Prefill and one decode step for each column of `forced` give the logits of one pass over all tokens."""
    length = inputs["input_ids"].shape[1]
    state, step = ours.prefill(ours.prepare(inputs), max_length=length + forced.shape[1] + 1)
    steps = [np.asarray(step.main)]
    for column in forced.T:
        state, step = ours.decode(state, column.astype(np.int32))
        steps.append(np.asarray(step.main))
    whole = {
        **inputs,
        "input_ids": np.concatenate([inputs["input_ids"], forced], axis=1),
        "attention_mask": np.concatenate([inputs["attention_mask"], np.ones_like(forced)], axis=1),
    }
    expected = np.asarray(ours.logits(whole))[:, length - 1 :]
    np.testing.assert_allclose(np.stack(steps, axis=1), expected, rtol=0, atol=1e-4)


def assert_prepared_like(ours, processor, conversations):
    """`ours.prepare` lays out each conversation as transformers' processor does, its tiles in the same order."""
    for messages in conversations:
        expected = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="np", add_generation_prompt=True
        )
        inputs = ours.prepare(messages)
        np.testing.assert_array_equal(inputs.tokens[0, -int(inputs.lengths[0]) :], expected["input_ids"][0])
        tiles = np.bincount(inputs.owner[inputs.owner >= 0])
        own = [image[:count] for image, count in zip(expected["pixel_values"], tiles, strict=True)]
        np.testing.assert_array_equal(inputs.pixels[inputs.owner >= 0], np.concatenate(own))


def conversation(question, *sizes):
    """One user message: random pictures of the given sizes, then the question."""
    generator = np.random.default_rng(len(sizes))
    pictures = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    content = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
