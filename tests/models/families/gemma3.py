"""Gemma 3, whose sliding window is narrower than an image."""

import numpy as np
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from lvlm_jax import LVLM
from tests.checkpoints import IMAGE
from tests.models.families.base import Family, byte_tokenizer, chat_template


class Gemma3(Family):
    classes = Gemma3Config, Gemma3ForConditionalGeneration
    layouts = Family.layouts | {"padded": [(26,), (3, IMAGE, 5), (2, IMAGE, 4, IMAGE, 9)]}
    counts = 16, 16
    marker = "<start_of_image>"
    refused_arrays = [
        (lambda a: {"pixel_values": a["pixel_values"][:, :, :20]}, "expected .images, 3, 32, 32."),
        (lambda a: {"pixel_values": a["pixel_values"][:1]}, "2 image placeholders and 1 images"),
        (lambda a: {"pixel_values": a["pixel_values"] * np.nan}, "NaN"),
        (lambda a: {name: a[name][:, :-9] for name in ("input_ids", "attention_mask")}, "truncate"),
    ]

    def adjust(self, model):
        for name, parameter in model.named_parameters():
            if "norm" in name and "vision_tower" not in name:
                parameter.data -= 1  # these norms multiply by one more
            if "post_attention_layernorm" in name or "post_feedforward_layernorm" in name:
                parameter.data += 2  # as large as the embeddings, which are scaled

    def inputs(self, config, seed, layouts):
        inputs = super().inputs(config, seed, layouts)
        # What transformers asks for besides, to see images as wholes.
        return inputs | {"token_type_ids": (inputs["input_ids"] == config.image_token_index).astype(np.int64)}

    def image(self, config, part):
        placeholders = [config.image_token_index] * config.mm_tokens_per_image
        return [config.boi_token_index, *placeholders, config.eoi_token_index]

    def with_processor(self, folder):
        tokens = dict(image_token_index=259, boi_token_index=260, eoi_token_index=261)
        self.build(folder, 12, text={"vocab_size": 262}, **tokens)
        roles = dict(image_token="<image_soft_token>", boi_token=self.marker, eoi_token="<end_of_image>")
        Gemma3Processor(
            Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
            byte_tokenizer(list(roles.values()), **roles),
            chat_template=chat_template(self.marker),
            image_seq_length=16,
        ).save_pretrained(folder)
        return LVLM.from_pretrained(folder)


GEMMA3 = Gemma3("gemma3")
