"""SmolVLM and Idefics3. In a layout a pair (rows, columns) stands for an image with that grid of tiles."""

import numpy as np
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from lvlm_jax import LVLM
from tests.models.families.base import Family, byte_tokenizer, chat_template, normal

FENCE, GLOBAL, ROW, NEWLINE = 118, 117, 116, 115  # what stands around the tiles
SIDE = 26  # pixels of a tile
TOKENS, PIXELS = ("input_ids", "attention_mask"), ("pixel_values", "pixel_attention_mask")


class SmolVlm(Family):
    layouts = {
        "padded": [(9,), (3, (1, 2), 5), (2, (0, 0), (1, 2), 4, (0, 0), 9)],
        "alone": [(4, (0, 0), 3, (2, 1), 6)],  # a whole picture, then a portrait one that is cut
        "text": [(11,)],
    }
    two, one = (3, (0, 0), 4, (1, 2), 5), (2, (2, 1), 6)
    pictures = ((40, 24), (10, 60))  # 72 x 44 pixels are 3 x 2 tiles, 12 x 72 are 1 x 3, and each has the whole besides
    counts = 28, 16
    specials = ["<image>", "<fake_token_around_image>", "<end_of_utterance>"]
    refused_layout = (4, (1, 2), 3, (0, 0), 2)
    refused_arrays = [
        (lambda a: {"pixel_values": a["pixel_values"][:, 0]}, "expected .samples, tiles, 3, side, side."),
        (lambda a: {"pixel_values": a["pixel_values"][..., :24, :]}, "expected .samples, tiles, 3, side, side"),
        (lambda a: {"pixel_values": a["pixel_values"][..., :16, :16]}, "expected .samples, tiles, 3, side, "),
        (lambda a: {"pixel_values": a["pixel_values"] * np.nan}, "NaN"),
        (lambda a: {name: a[name][:, :3] for name in PIXELS}, "16 image tokens and its 3 tiles take 12"),
        (lambda a: {"pixel_values": None}, "16 image tokens"),
        (lambda a: {name: a[name][:, :-8] for name in TOKENS}, "do not truncate"),
        (lambda a: {"pixel_attention_mask": a["pixel_attention_mask"][..., 1:]}, "pixel_attention_mask has "),
        (lambda a: {"pixel_attention_mask": a["pixel_attention_mask"] * 0}, "upper left corner of tile 0"),
    ]

    def __init__(self, name, configuration, model, image_processor):
        super().__init__(name)
        self.classes, self.image_processor = (configuration, model), image_processor

    def adjust(self, model):
        norm = model.model.text_model.norm.weight.data
        norm.copy_((norm - 1).sign())  # of either sign: with tied embeddings a token would mostly predict itself

    def image(self, config, part):
        """The tokens of one image, as processors lay them out."""
        tile = [config.image_token_id] * (6 // config.scale_factor) ** 2
        row = [FENCE, ROW, *tile] * part[1]
        end = [NEWLINE] if part[0] else []
        return [*[*row, NEWLINE] * part[0], *end, FENCE, GLOBAL, *tile, FENCE]

    def pixels(self, config, generator, images):
        """Pixels `[B, tiles, 3, 26, 26]`; the edges of every second tile are left out."""
        counts = [sum(rows * columns + 1 for rows, columns in one) for one in images]
        pixels = np.zeros((len(counts), max(counts), 3, SIDE, SIDE), np.float32)
        mask = np.zeros((len(counts), max(counts), SIDE, SIDE), np.int64)
        for sample, count in enumerate(counts):
            pixels[sample, :count] = normal(generator, count, 3, SIDE, SIDE)
            for tile in range(count):
                height, width = generator.integers(9, SIDE + 1, 2) if tile % 2 else (SIDE, SIDE)
                mask[sample, tile, :height, :width] = 1
        return {"pixel_values": pixels, "pixel_attention_mask": mask}

    def with_processor(self, folder):
        """Idefics3 writes its marks letter by letter."""
        special = list(self.specials)
        if self.name == "smolvlm":
            special += ["<global-img>", *(f"<row_{i}_col_{j}>" for i in (1, 2, 3) for j in (1, 2, 3))]
        text = {"vocab_size": 259 + len(special), "max_position_embeddings": 2048}
        self.build(folder, 12, text=text, image_token_id=259)
        processor = Idefics3Processor(
            self.image_processor(size={"longest_edge": 72}, max_image_size={"longest_edge": 24}),
            byte_tokenizer(special),
            image_seq_len=4,
            chat_template=chat_template(self.marker),
        )
        processor.save_pretrained(folder)
        for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
            path = folder / name
            if path.is_file() and self.name == "smolvlm":  # as its repositories name it
                path.write_text(path.read_text().replace("Idefics3Processor", "SmolVLMProcessor"))
        return LVLM.from_pretrained(folder)

    def check(self, theirs, ours, inputs):
        """Tiles of a cut picture are one image; without a mask of pixels all of them count."""
        images = [sum(isinstance(part, tuple) for part in one) for one in self.layouts["padded"]]
        assert ours.prepare(inputs).image_id.max(axis=1).tolist() == images
        bare = {name: array for name, array in inputs.items() if name != "pixel_attention_mask"}
        logits = np.asarray(ours.logits(bare))
        # Transformers leaves out the empty tiles that fill up a row; so do we, by their zeros.
        for row, want in enumerate(self.logits(theirs, bare)):
            np.testing.assert_allclose(logits[row, -len(want) :], want, rtol=0, atol=1e-4)

    def their_pixels(self, arrays):
        return arrays["pixel_values"][0]


SMOLVLM = SmolVlm("smolvlm", SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil)
IDEFICS3 = SmolVlm("idefics3", Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil)
