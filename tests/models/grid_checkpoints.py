"""Inputs of random checkpoints whose processors hand out loose patches and a grid for each image."""

import numpy as np


def random_inputs(config, seed, layouts):
    """Left-padded arrays for a batch whose prompts are drawn at random.

    Args:
        config: the transformers configuration of the model.
        seed: seed of tokens and pixels.
        layouts: one tuple per sample; an integer stands for that many text tokens, a pair for an image of so many rows
          and columns of patches.

    Returns a dict of NumPy arrays: input_ids, attention_mask, mm_token_type_ids [B, S], and, where there are images,
    pixel_values [patches, patch size] and image_grid_thw [images, 3] of all samples in reading order.
    """
    generator = np.random.default_rng(seed)
    vision, rows, grids = config.vision_config, [], []
    for layout in layouts:
        parts = []
        for part in layout:
            if isinstance(part, tuple):
                grids.append((1, *part))
                tokens = part[0] * part[1] // vision.spatial_merge_size**2
                parts.append(np.full(tokens, config.image_token_id))
            else:
                # The last tokens of the vocabulary stand for images and videos.
                parts.append(generator.integers(3, config.text_config.vocab_size - 4, part))
        rows.append(np.concatenate(parts))
    length = max(map(len, rows))
    ids = np.stack([np.pad(row, (length - len(row), 0)) for row in rows]).astype(np.int64)
    inputs = {
        "input_ids": ids,
        "attention_mask": np.stack([np.arange(length) >= length - len(row) for row in rows]).astype(np.int64),
        "mm_token_type_ids": (ids == config.image_token_id).astype(np.int64),
    }
    if grids:
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        count = sum(height * width for _, height, width in grids)
        inputs["pixel_values"] = generator.normal(size=(count, patch)).astype(np.float32)
        inputs["image_grid_thw"] = np.asarray(grids)
    return inputs


def valid_rows(logits, mask, row):
    """Logits at the valid tokens of one left-padded row: its last tokens, whatever the padded length is."""
    return np.asarray(logits[row])[-int(mask[row].sum()) :]
