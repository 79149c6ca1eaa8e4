"""Which tiles are one image, and placeholders that are not expanded, of families that cut pictures."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, LlavaOnevisionProcessor
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

from lvlm_jax import LVLM, models
from lvlm_jax.models.smolvlm import patch_positions, tiles_per_image
from tests.models.families.internvl import INTERNVL
from tests.models.families.smolvlm import IDEFICS3, SIDE, SMOLVLM
from tests.models.families.tiled import LANDSCAPE, LLAVA_NEXT, LLAVA_ONEVISION, PORTRAIT, SQUARE


def bare(family):
    """A model without weights, which lays out prompts."""
    return LVLM({}, models.config_from_hf(family.raw()))


def test_internvl_takes_one_placeholder_for_an_image_or_for_a_tile():
    ours = bare(INTERNVL)
    arrays = INTERNVL.inputs(INTERNVL.config(), 4, [(4, (2,), 3, (1,), 5)])
    expanded, tokens, mark = ours.prepare(arrays), arrays["input_ids"][0], ours.config.image_token_id
    first = (tokens == mark) & ~np.pad(tokens == mark, 1)[:-2]
    short = {"input_ids": tokens[first | (tokens != mark)][None]}
    known = ours.prepare(short | {"pixel_values": arrays["pixel_values"], "num_patches": np.array([2, 1])})
    np.testing.assert_array_equal(known.tokens, expanded.tokens)
    np.testing.assert_array_equal(known.image_id, expanded.image_id)
    single = ours.prepare(short | {"pixel_values": arrays["pixel_values"][:2]})
    assert single.owner.tolist() == [0, 1] and single.image_id.max() == 2
    only = ours.prepare({"input_ids": np.array([[5, mark, 6]]), "pixel_values": arrays["pixel_values"]})
    assert only.owner.tolist() == [0, 0, 0] and (only.image_id == 1).sum() == 12


def test_internvl_lays_out_tiles_by_the_bucket(tmp_path):
    ours = INTERNVL.with_processor(tmp_path)
    pictures = [np.full((*size, 3), 200, np.uint8) for size in INTERNVL.pictures]
    parts = [{"type": "image", "image": picture} for picture in pictures]
    prompt = ours.prepare([{"role": "user", "content": parts}])
    assert prompt.owner.tolist() == [0] * 4 + [1] * 3 + [-1] and not prompt.pixels[-1].any()
    text = ours.prepare([{"role": "user", "content": "only words"}])
    assert text.pixels is None and np.isfinite(ours.logits(text)).all()
    for tied in (True, False):  # a flag that transformers 4 leaves out is that of the decoder
        raw = INTERNVL.config(text={"tie_word_embeddings": tied}).to_dict()
        del raw["tie_word_embeddings"]
        config = models.config_from_hf(raw)
        assert config.text.tie_word_embeddings is config.hf["tie_word_embeddings"] is tied
        assert config.image_token_id == INTERNVL.rest["image_token_id"]


@pytest.mark.parametrize("family", [SMOLVLM, IDEFICS3], ids=lambda family: family.name)
def test_smolvlm(family, tmp_path):
    """One placeholder for a row or for a tile; rows of tiles come in buckets; pictures that are not cut."""
    ours, mark = bare(family), family.rest["image_token_id"]
    pixels = {"pixel_values": np.random.default_rng(5).normal(size=(1, 3, 3, SIDE, SIDE)).astype(np.float32)}
    size = (6 // ours.config.scale) ** 2
    whole = ours.prepare({"input_ids": np.array([[5, mark, 6]])} | pixels)
    assert whole.image_id.max() == 1 and (whole.image_id == 1).sum() == 3 * size
    each = ours.prepare({"input_ids": np.array([[5, *[mark] * 3, 6]])} | pixels)
    assert [(each.image_id == image).sum() for image in (1, 2, 3)] == [size] * 3
    layouts = [[((1, count), 4)] for count in (3, 4, 5)]
    prompts = [ours.prepare(family.inputs(family.config(), 5, layout)) for layout in layouts]
    assert [len(prompt.pixels) for prompt in prompts] == [4, 6, 6]
    assert prompts[1].owner.tolist() == [0] * 5 + [-1]
    ours = family.with_processor(tmp_path)
    picture = np.random.default_rng(2).integers(0, 256, (40, 24, 3), dtype=np.uint8)
    settings = dict(return_tensors="np", do_image_splitting=False)
    arrays = ours.processor(images=[[picture, picture]], text="<image><image>b", **settings)
    prompt = ours.prepare(dict(arrays))
    assert prompt.image_id.max() == 2 and prompt.owner.tolist() == [0, 1]


@pytest.mark.parametrize(("seen", "side"), [(6, 6), (5, 6), (2, 6), (1, 6), (26, 26), (17, 26), (27, 27), (32, 32)])
def test_positions_of_patches(seen, side):
    """Against transformers, for towers and pictures whose fractions lie on borders of the grid and between them."""
    vision = {"hidden_size": 1, "image_size": side, "patch_size": 1}
    embeddings = SmolVLMVisionEmbeddings(
        AutoConfig.for_model("smolvlm", vision_config=vision).vision_config
    ).requires_grad_(False)
    embeddings.patch_embedding.weight.zero_()
    embeddings.patch_embedding.bias.zero_()
    embeddings.position_embedding.weight.copy_(torch.arange(side**2)[:, None])
    mask = np.zeros((1, side, side), bool)
    mask[:, :seen, : max(1, seen - 1)] = True
    want = embeddings(torch.zeros(1, 3, side, side), torch.from_numpy(mask))[..., 0].numpy()
    np.testing.assert_array_equal(patch_positions(mask, side), want)


def test_tiles_without_marks_are_images():
    tile = [9, 9]
    for row, counts in (
        ([*tile, 1, *tile, 1], [1, 1]),  # no fence in front
        ([1, *tile, 1, *tile], [1, 1]),  # none behind
        ([1, *tile, *tile, 1], [1, 1]),  # none between
        ([1, *tile, 1, *tile, 1, 1, *tile, 1], [2, 1]),
        ([1, 2], []),
    ):
        assert tiles_per_image(np.array(row), 9, 2) == counts


def test_llava_next_expands_placeholders():
    ours = bare(LLAVA_NEXT)
    inputs = LLAVA_NEXT.inputs(LLAVA_NEXT.config(), 5, LLAVA_NEXT.layouts["two"])
    ids = inputs["input_ids"][0]
    image = ids == ours.config.image_token_id
    short = ids[~image | np.append(True, ~image[:-1])]
    given = inputs | {"input_ids": short[None], "attention_mask": np.ones((1, len(short)), np.int64)}
    np.testing.assert_array_equal(ours.prepare(given).tokens, ours.prepare(inputs).tokens)


def test_llava_onevision_cuts_pictures_that_come_alone(tmp_path):
    ours = LLAVA_ONEVISION.with_processor(tmp_path)
    assert isinstance(ours.processor, LlavaOnevisionProcessor)
    generator = np.random.default_rng(1)
    conversations = [
        [{"type": "image", "image": generator.integers(0, 256, (*size, 3), dtype=np.uint8)} for size in sizes]
        for sizes in ([LANDSCAPE], [PORTRAIT, SQUARE])
    ]
    together = ours.prepare([[{"role": "user", "content": parts}] for parts in conversations])
    np.testing.assert_array_equal(np.bincount(together.owner[together.owner >= 0]), [9, 1, 1])
    text = LLAVA_ONEVISION.chat.format(LLAVA_ONEVISION.marker)
    want = ours.processor(images=[conversations[0][0]["image"]], text=text, return_tensors="np")
    alone = ours.prepare([{"role": "user", "content": conversations[0]}])
    np.testing.assert_array_equal(alone.tokens[0][alone.image_id[0] >= 0], want["input_ids"][0])
    np.testing.assert_array_equal(LLAVA_ONEVISION.our_pixels(alone), want["pixel_values"][0])
