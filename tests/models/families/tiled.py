"""LLaVA-NeXT and LLaVA-OneVision, which cut images into tiles. In a layout (height, width) stands for an image."""

import numpy as np
import torch
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from lvlm_jax import LVLM, models
from lvlm_jax.pocket.tokenizer import CHAT_TEMPLATE
from lvlm_jax.processors.load import processor_class
from tests import small
from tests.checkpoints import to_torch
from tests.models.families.base import Family, normal

TILE = 8  # pixels
# Heights and widths in pixels; each fills another part of another resolution.
LANDSCAPE, PORTRAIT, SQUARE = (10, 26), (29, 12), (9, 9)
ALONE = "alone"


class Tiled(Family):
    layouts = {
        "padded": [(6,), (3, LANDSCAPE, 5), (2, PORTRAIT, 4, SQUARE, 9)],
        "one": [(3, LANDSCAPE, 5)],
        "two": [(4, PORTRAIT, 3, LANDSCAPE, 6)],
        "text": [(11,)],
    }
    two, one = (3, LANDSCAPE, 4, PORTRAIT, 5), (2, SQUARE, 6)
    word = small.IMAGE_TOKEN_ID
    pictures = PORTRAIT, SQUARE
    marker, chat = "<image>\n", "USER: {} ASSISTANT:"
    refused_layout = layouts["two"][0]
    refused_arrays = [(lambda a: {"image_sizes": None}, "image_sizes is missing")]

    def pixels(self, config, generator, images):
        sizes, tiles = sum(images, []), 1 + max(h * w for h, w in config.image_grid_pinpoints) // TILE**2
        pixels = normal(generator, len(sizes), tiles, 3, TILE, TILE)
        return {"pixel_values": pixels, "image_sizes": np.array([size[:2] for size in sizes])}

    def placeholders(self, config, images, arrays):
        """A model of transformers says how many tokens each image takes."""
        if not arrays:
            return []
        with torch.no_grad():
            model = self.classes[1](config).eval()
            tokens = model.get_image_features(**to_torch(arrays), return_dict=True).pooler_output
        return [np.full(len(one), config.image_token_index) for one in tokens]

    def with_processor(self, folder):
        self.build(folder)
        self.processor().save_pretrained(str(folder))
        return LVLM.from_pretrained(folder, dtype="float32")

    def their_pixels(self, arrays):
        """Tiles of all images in sequence, without the empty ones that pad them."""
        tiles = arrays["pixel_values"].reshape(-1, 3, TILE, TILE)
        return tiles[tiles.any(axis=(1, 2, 3))]


class LlavaNext(Tiled):
    counts = 66, 88
    classes = LlavaNextConfig, LlavaNextForConditionalGeneration
    refused_arrays = [
        *Tiled.refused_arrays,
        (lambda a: {"image_sizes": np.array([[8, 8]])}, "each of the 2 images"),
        (lambda a: {"image_sizes": np.array([[10, 26], [0, 8]])}, "one positive height and width"),
        (lambda a: {"image_sizes": np.array([[10, 26], [1, 9999]])}, "9999 x 1 pixels is too narrow"),
        (lambda a: {"pixel_values": np.zeros((2, 3, 8, 8))}, r"\(2, 3, 8, 8\); expected \[images, tiles, 3, 8, 8\]"),
        (lambda a: {"pixel_values": np.zeros((2, 2, 3, 8, 8))}, "has 2 tiles and its image_sizes call for 4"),
        (lambda a: {name: a[name][:, :-40] for name in ("input_ids", "attention_mask")}, "do not truncate"),
    ]

    def processor(self):
        """Transformers' own."""
        return LlavaNextProcessor(
            image_processor=LlavaNextImageProcessorPil(
                size={"shortest_edge": TILE},
                crop_size={"height": TILE, "width": TILE},
                image_grid_pinpoints=self.rest["image_grid_pinpoints"],
            ),
            tokenizer=small.build_processor().tokenizer,
            patch_size=2,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=CHAT_TEMPLATE,
        )


class LlavaOnevision(Tiled):
    """Several images of a prompt are not cut into tiles; (height, width, ALONE) always is."""

    classes = LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
    layouts = Tiled.layouts | {
        # The first is two tiles, whose features are not shrunk.
        "tiled": [(5, (8, 14, ALONE), 2), (3, (*LANDSCAPE, ALONE), 4, (*SQUARE, ALONE), 3)]
    }
    counts = 17, 17
    two, one = (3, (*LANDSCAPE, ALONE), 4, (*PORTRAIT, ALONE), 5), (2, (*SQUARE, ALONE), 6)
    refused_arrays = [
        *Tiled.refused_arrays,
        (lambda a: {"batch_num_images": np.array([1, 2])}, r"batch_num_images is \[1, 2\]; expected .* 2 in all"),
        (lambda a: {"pixel_values_videos": np.zeros((1, 2, 3, 8, 8))}, "videos cannot be read"),
    ]

    def pixels(self, config, generator, images):
        arrays = super().pixels(config, generator, images)
        if any(ALONE in part for one in images for part in one):
            return arrays
        return arrays | {"batch_num_images": np.array([len(one) for one in images if one])}

    def processed(self, processor, pictures, text):
        return super().processed(processor, [pictures], text)

    def processor(self):
        """Transformers' own; the part for videos, which needs torchvision, is left out."""
        return processor_class(models.config_from_hf(self.config().to_dict()))(
            image_processor=LlavaOnevisionImageProcessorPil(
                size={"height": TILE, "width": TILE}, image_grid_pinpoints=self.rest["image_grid_pinpoints"]
            ),
            tokenizer=small.build_processor().tokenizer,
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_3",
            chat_template=CHAT_TEMPLATE,
        )


LLAVA_NEXT, LLAVA_ONEVISION = LlavaNext("llava_next"), LlavaOnevision("llava_onevision")
