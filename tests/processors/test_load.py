"""Loading a processor: sizes that its files leave out, and Pillow whatever is installed."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from lvlm_jax.errors import LVLMError
from lvlm_jax.processors import inputs, load
from lvlm_jax.weights import model_config, names

PARTS = [{"type": "image", "image": Image.new("RGB", (96, 96))}, {"type": "text", "text": "What?"}]
CHAT = [{"role": "user", "content": PARTS}]


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(names.checkpoint("pocket"), tmp_path / "model"))


@pytest.fixture
def settings(folder):
    return json.loads((folder / "processor_config.json").read_text())


@pytest.mark.parametrize(
    "kept", [None, ("patch_size", "vision_feature_select_strategy", "image_token", "processor_class")]
)
def test_sizes_that_older_files_leave_out_come_from_the_model(folder, settings, kept):
    config = model_config(folder)
    want = inputs.from_messages(load.load_processor(folder, config), config, CHAT)
    older = settings["image_processor"] | {"processor_class": "LlavaProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(older))
    (folder / "processor_config.json").unlink()
    if kept:
        written = {name: settings[name] for name in kept}
        (folder / "processor_config.json").write_text(json.dumps(written))
    got = inputs.from_messages(load.load_processor(folder, config), config, CHAT)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.pixels, want.pixels)


def test_what_files_say_stays_and_a_folder_without_its_tokenizer_is_refused(folder, settings):
    """transformers makes an empty tokenizer of some families then, whose every word is unknown."""
    settings["num_additional_image_tokens"] = 3
    (folder / "processor_config.json").write_text(json.dumps(settings))
    assert load.load_processor(folder, model_config(folder)).num_additional_image_tokens == 3
    (folder / "tokenizer.json").unlink()
    with pytest.raises(LVLMError, match="has no tokenizer .looked for tokenizer.json, .*copy it") as caught:
        load.load_processor(folder, model_config(folder))
    assert "\n" not in str(caught.value)


class TorchvisionBackend:
    """Stands in for the class of that name in transformers, which needs torchvision."""


class WithTorchvision(TorchvisionBackend):
    """An image processor as transformers loads it where torchvision is installed."""


def test_images_are_read_with_pillow_whatever_is_installed(folder, monkeypatch):
    config = model_config(folder)
    plain = load.load_processor(folder, config)
    assert load.images_backend(plain.image_processor) == "pil"
    assert load.images_backend(WithTorchvision()) == "torchvision"

    class Processors:
        @staticmethod
        def from_pretrained(*given, **options):
            processor = copy.copy(plain)
            processor.image_processor = WithTorchvision()
            return processor

    monkeypatch.setattr(load, "processor_class", lambda config: Processors)
    replaced = load.load_processor(folder, config)
    assert type(replaced.image_processor) is CLIPImageProcessorPil
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8))
    np.testing.assert_array_equal(*(inputs.pixels_of(each, [picture]) for each in (plain, replaced)))
    monkeypatch.setattr("transformers.AutoImageProcessor.from_pretrained", lambda *a, **b: WithTorchvision())
    with pytest.raises(LVLMError, match="no image processor of .* that works with Pillow .WithTorchvision"):
        load.load_processor(folder, config)


def test_a_class_that_transformers_does_not_know_is_no_reason_to_read_text_alone(folder, settings):
    (folder / "processor_config.json").write_text(json.dumps(settings | {"processor_class": "Llava-1r"}))
    with pytest.raises(LVLMError, match="not one of images and text; take processor_class from"):
        load.load_processor(folder, model_config(folder))
