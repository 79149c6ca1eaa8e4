"""LLaVA, whose tiny configurations are those of `tests.checkpoints`."""

import numpy as np
from transformers import LlavaConfig, LlavaForConditionalGeneration

from lvlm_jax import LVLM
from tests import small
from tests.checkpoints import llava_config, select
from tests.models.families.base import Family
from tests.reference import llava as reference


class Llava(Family):
    classes = LlavaConfig, LlavaForConditionalGeneration
    new_tokens, distinct = 64, 12
    counts = 16, 16
    marker, chat = "<image>\n", "USER: {} ASSISTANT:"

    def config(self, text=None, vision=None, **overrides):
        config = llava_config(text, vision, **overrides)
        config._attn_implementation = "eager"
        return config

    def image(self, config, part):
        return np.full(config.image_seq_length, config.image_token_index)

    def check(self, theirs, ours, inputs):
        """The float64 reference of other tests is transformers' model too."""
        weights, config = reference.from_torch(theirs)
        for row, want in enumerate(self.logits(theirs, inputs)):
            sample = select(theirs.config, inputs, row)
            got = reference.logits(weights, config, sample["input_ids"][0], sample.get("pixel_values"))
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)

    def with_processor(self, folder):
        self.build(folder, 3, **small.OVERRIDES)
        small.write_processor(folder)
        return LVLM.from_pretrained(folder)


LLAVA = Llava("llava")
