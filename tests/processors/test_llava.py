"""LLaVA's own checkpoints: images are processed as their configuration says."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoConfig, AutoProcessor

from lvlm_jax import LVLM
from tests import small
from tests.weights import checkpoints as make

VOCABULARY = 259
SIDE = 28


def original(folder, aspect):
    """An authors' checkpoint with a tower beside it, and with processor files as of a `llava-hf` repository."""
    rest, tower = make.split_tower(make.tensors(make.random_model(0, vocab_size=VOCABULARY)))
    make.clip_model(tower, False).save_pretrained(folder / "clip")
    config = make.original_config(str(folder / "clip"), VOCABULARY) | {"image_aspect_ratio": aspect}
    make.write(folder / "llava", config, rest)
    small.build_processor().save_pretrained(str(folder / "llava"))
    path = folder / "llava" / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"patch_size": 14}))
    return LVLM.from_pretrained(folder / "llava")


def wide(left=200):
    picture = np.random.default_rng(0).integers(0, 255, (40, 80, 3)).astype(np.uint8)
    picture[:, :15] = left
    return Image.fromarray(picture)


def pixels(model, picture):
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]
    return model.prepare([{"role": "user", "content": parts}]).pixels[0]


def expand2square(picture, color):
    """As in LLaVA's own mm_utils.py."""
    square = Image.new("RGB", (max(picture.size),) * 2, color)
    width, height = picture.size
    square.paste(picture, ((max(picture.size) - width) // 2, (max(picture.size) - height) // 2))
    return square


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    return original(tmp_path_factory.mktemp("pad"), "pad")


def test_pictures_are_padded_with_the_mean_color(padded, tmp_path):
    clip = small.build_processor().image_processor
    color = tuple(int(value * 255) for value in clip.image_mean)
    for picture in (wide(), wide().transpose(Image.Transpose.ROTATE_90)):
        want = clip(images=expand2square(picture, color), return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(pixels(padded, picture), want, rtol=0, atol=1e-6)
    assert not np.array_equal(pixels(padded, wide(0)), pixels(padded, wide(255)))
    model = original(tmp_path, "square")  # whose pictures are cropped
    assert np.array_equal(pixels(model, wide(0)), pixels(model, wide(255)))


def test_what_is_saved_pads_too(padded, tmp_path):
    saved = padded.save_pretrained(tmp_path / "out")
    want = pixels(padded, wide())
    np.testing.assert_array_equal(pixels(LVLM.from_pretrained(saved), wide()), want)
    theirs = AutoProcessor.from_pretrained(saved, backend="pil")
    assert theirs.image_processor.do_pad and AutoConfig.from_pretrained(saved).model_type == "llava"
    got = theirs.image_processor(images=wide(), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
