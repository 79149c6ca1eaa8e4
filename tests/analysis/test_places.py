"""Maps over images in families with a grid for each image, with a view of the whole image, or without a grid."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lvlm_jax import LVLM, models
from lvlm_jax.analysis import overlay, token_places
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation.questions import conversation
from tests.checkpoints import IMAGE
from tests.models.families.instructblip import INSTRUCTBLIP
from tests.models.families.patches import QWEN2_VL
from tests.models.families.tiled import LLAVA_NEXT


class Numbered(LVLM):
    """A model whose attention on an image token is the token's number."""

    def attention(self, prompt, tokens, method=None):
        count = int((self.prepare(prompt).image_id > 0).sum())
        return [np.broadcast_to(np.arange(count, dtype=np.float32), (2, len(tokens[0]), 3, count))]


@pytest.fixture
def qwen2_vl(tmp_path):
    """A LLaVA-NeXT without weights, with a processor."""
    tokenizer = QWEN2_VL.write_processor(tmp_path)
    config = models.config_from_hf(QWEN2_VL.config(text={"vocab_size": len(tokenizer)}).to_dict())
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return Numbered({}, dataclasses.replace(config, image_token_id=image, video_token_id=-5), tmp_path)


def test_each_picture_has_the_grid_of_its_tokens(qwen2_vl):
    pictures = [Image.new("RGB", size) for size in ((40, 16), (16, 24))]
    words = qwen2_vl.processor.tokenizer("a dog")["input_ids"]
    first, second = overlay.rows_of(qwen2_vl, "greedy", pictures, conversation(pictures, "What is it?"), words)
    assert list(first.words) == ["a", "dog"] and first.region is second.region is None
    np.testing.assert_array_equal(first.maps[0], np.arange(10).reshape(2, 5))
    np.testing.assert_array_equal(second.maps[1], 10 + np.arange(6).reshape(3, 2))


def test_more_images_than_pictures(qwen2_vl):
    pictures = [Image.new("RGB", (16, 16))] * 2
    with pytest.raises(LVLMError, match="2 images for 1 pictures"):
        token_places(qwen2_vl.config, qwen2_vl.prepare(conversation(pictures, "?")), 1)


def test_queries_have_no_places():
    config = models.config_from_hf(INSTRUCTBLIP.raw())
    inputs = INSTRUCTBLIP.inputs(INSTRUCTBLIP.config(), 1, [(IMAGE, 5)])
    with pytest.raises(LVLMError, match="queries over the whole image and lie on no grid"):
        token_places(config, LVLM({}, config).prepare(inputs), 1)


def test_how_the_view_of_the_whole_is_fitted():
    """Views of LLaVA-NeXT are stretched, though its processor also says that it crops."""

    def model(config):
        return SimpleNamespace(config=config, processor=SimpleNamespace(image_processor=processor))

    processor = LLAVA_NEXT.processor().image_processor
    assert processor.do_center_crop
    tiled = models.config_from_hf(LLAVA_NEXT.raw())
    assert overlay.fitted(model(tiled), 1) == "stretch"
    assert overlay.fitted(model(SimpleNamespace(nested_images=False, tiled=False)), 1) == "crop"
    together = SimpleNamespace(nested_images=True, tiled=True)
    assert [overlay.fitted(model(together), images) for images in (1, 2)] == ["stretch", "pad"]
