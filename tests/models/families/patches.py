"""Families whose processors hand out loose patches and a grid for each image: Qwen2-VL to Qwen3-VL, GLM-4.1V.

In a layout a pair stands for an image of so many rows and columns of patches.
"""

import json

import numpy as np
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from lvlm_jax import LVLM
from lvlm_jax.generation import decode_loop
from tests import small
from tests.checkpoints import to_torch
from tests.models.families.base import Family, normal

CHAT = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}MARKER{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}END{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
PREPROCESSOR = dict(patch_size=4, temporal_patch_size=2, merge_size=2)
PREPROCESSOR |= dict(image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])


class Patches(Family):
    tower = {"hidden_size": 32}
    layouts = {
        "padded": [(6,), (3, (12, 6), 5), (2, (6, 6), 4, (12, 6), 7)],
        "portrait": [(4, (12, 6), 5)],
        "landscape": [(4, (6, 12), 5)],
        "two": [(2, (6, 12), 3, (12, 6), 4)],
        "text": [(9,)],
    }
    two, one = (3, (4, 20), 4, (8, 4), 5), (2, (4, 4), 6)  # the longest in a bucket of its own
    distinct = 8
    pictures, counts = ((40, 21), (17, 50)), (15, 12)
    marker = "<|vision_start|><|image_pad|><|vision_end|>"
    start, end = "", "</s>\n"
    specials = {  # the last words of the tokenizer, in order
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
    }
    image_processor = "Qwen2VLImageProcessor"
    size = dict(min_pixels=8 * 8 * 4, max_pixels=8 * 8 * 16)
    template_file = "chat_template.json"
    refused_layout = layouts["two"][0]
    refused_arrays = [
        (lambda a: {"image_grid_thw": None}, "image_grid_thw is missing"),
        (lambda a: {"pixel_values": None}, "pixel_values is missing"),
        (lambda a: {"pixel_values": a["pixel_values"][:-1]}, "has 143 patches and image_grid_thw asks for 144"),
        (lambda a: {"pixel_values": a["pixel_values"][:, :-1]}, r"expected \[patches, "),
        (lambda a: {"image_grid_thw": a["image_grid_thw"][:, 1:]}, r"expected whole numbers \[images, 3\]"),
        (lambda a: {"image_grid_thw": a["image_grid_thw"] * [[2, 1, 1]]}, "an image of 2 frames"),
        (lambda a: {"image_grid_thw": a["image_grid_thw"] + [[0, 1, 0]]}, "7 x 12 patches; .* multiples of 2"),
        (lambda a: {"image_grid_thw": a["image_grid_thw"][:1]}, "has 144 patches and .* asks for 72"),
        (lambda a: {"pixel_values": a["pixel_values"] * np.nan}, "NaN or infinite"),
        (lambda a: {"input_ids": a["input_ids"][:, :-6], "attention_mask": None}, "image tokens"),
        (lambda a: {"pixel_values_videos": a["pixel_values"]}, "pixel_values_videos is given, but videos"),
        (lambda a: {"input_ids": np.where(a["input_ids"] == 118, 119, a["input_ids"])}, "the video token 119"),
    ]

    def __init__(self, name, configuration, model):
        super().__init__(name)
        self.classes = configuration, model
        self.processor_class = configuration.__name__.replace("Config", "Processor")
        self.chat = f"{self.start}<s>user\n{{}}{self.end}<s>assistant\n"

    def inputs(self, config, seed, layouts):
        inputs = super().inputs(config, seed, layouts)
        return inputs | {"mm_token_type_ids": (inputs["input_ids"] == config.image_token_id).astype(np.int64)}

    def image(self, config, part):
        return [config.image_token_id] * (part[0] * part[1] // config.vision_config.spatial_merge_size**2)

    def pixels(self, config, generator, images):
        vision, grids = config.vision_config, np.array([(1, *part) for one in images for part in one])
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {"pixel_values": normal(generator, grids.prod(axis=1).sum(), patch), "image_grid_thw": grids}

    def logits(self, theirs, inputs):
        theirs.model.rope_deltas = None  # transformers keeps what it knows of positions from one call to the next
        return super().logits(theirs, inputs)

    def greedy(self, theirs, inputs):
        theirs.model.rope_deltas = None
        return super().greedy(theirs, inputs)

    def check(self, theirs, ours, inputs):
        """Positions along the three axes, that of the next token, and that neither a bucket nor a batch matters."""
        prompt, tensors = ours.prepare(inputs), to_torch(inputs)
        tensors.pop("pixel_values")
        positions, deltas = theirs.model.get_rope_index(**tensors)
        for row, length in enumerate(prompt.lengths):
            kept = inputs["attention_mask"][row].astype(bool)
            np.testing.assert_array_equal(prompt.axes[:, row, -length:], positions[:, row, kept].numpy())
        state, _ = ours.prefill(prompt, max_length=int(prompt.lengths.max()) + 64)
        np.testing.assert_array_equal(state.position, prompt.lengths + deltas[:, 0].numpy())
        tokens, start, taken = encoded(ours, prompt), 0, 0
        for grid in inputs["image_grid_thw"]:
            pixels = inputs["pixel_values"][start : start + grid.prod()]
            alone = ours.config.pictures([{"pixel_values": pixels, "image_grid_thw": grid[None]}], [])
            count = int(alone.token_counts[0])
            got = tokens[taken : taken + count]
            np.testing.assert_allclose(got, encoded(ours, alone)[:count], rtol=0, atol=1e-5)
            start, taken = start + grid.prod(), taken + count
        assert start == len(inputs["pixel_values"])

    def write_processor(self, folder):
        """The files of a processor as the repositories have them, over a tokenizer of bytes, which is returned."""
        tokenizer = small.build_processor().tokenizer
        tokenizer.add_special_tokens({"additional_special_tokens": list(self.specials.values())})
        tokenizer.save_pretrained(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        for name in ("image_token", "chat_template", "processor_class"):
            settings.pop(name, None)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        template = self.start + CHAT.replace("MARKER", self.marker).replace("END", self.end)
        if self.template_file.endswith("json"):
            template = json.dumps({"chat_template": template})
        (folder / self.template_file).write_text(template)
        classes = dict(image_processor_type=self.image_processor, processor_class=self.processor_class)
        (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | classes | self.size))
        return tokenizer

    def token_ids(self, tokenizer):
        """The fields of a configuration that name tokens, as the tokenizer numbers them."""
        return {name: tokenizer.convert_tokens_to_ids(token) for name, token in self.specials.items()}

    def with_processor(self, folder):
        tokenizer = self.write_processor(folder)
        self.build(folder, 3, text={"vocab_size": len(tokenizer)}, **self.token_ids(tokenizer))
        return LVLM.from_pretrained(folder)

    def our_pixels(self, prompt):
        return prompt.pixels[prompt.geometry["valid"]]


def encoded(ours, pictures):
    """The tokens of all images."""
    return np.asarray(
        decode_loop.encode_images(ours.params, ours.config, pictures.pixels, pictures.geometry), np.float32
    )


class Glm4v(Patches):
    counts = 15, 12
    marker = "<|begin_of_image|><|image|><|end_of_image|>"
    start, end = "[gMASK]", ""
    specials = {
        "image_start_token_id": "<|begin_of_image|>",
        "image_token_id": "<|image|>",
        "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_token_id": "<|video|>",
        "video_end_token_id": "<|end_of_video|>",
    }
    image_processor = "Glm4vImageProcessor"
    size = {"size": {"shortest_edge": 8 * 8 * 8, "longest_edge": 8 * 8 * 32}}
    template_file = "chat_template.jinja"


GLM4V = Glm4v("glm4v", Glm4vConfig, Glm4vForConditionalGeneration)
QWEN2_VL = Patches("qwen2_vl", Qwen2VLConfig, Qwen2VLForConditionalGeneration)
QWEN2_5_VL = Patches("qwen2_5_vl", Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration)
QWEN3_VL = Patches("qwen3_vl", Qwen3VLConfig, Qwen3VLForConditionalGeneration)
