"""InstructBLIP, in both layouts of the hub. In a layout images stand first."""

import json

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import (
    BertTokenizer,
    BlipImageProcessorPil,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    PreTrainedTokenizerFast,
)

from lvlm_jax import LVLM
from tests import small
from tests.checkpoints import IMAGE
from tests.models.families.base import Family

QUERIES = 4
WORDS = "[PAD] [UNK] [CLS] [SEP] what is this red the you are confused ?".split()  # of the Q-Former


class InstructBlip(Family):
    classes = InstructBlipConfig, InstructBlipForConditionalGeneration
    layouts = {
        "padded": [(6,), (IMAGE, 5), (IMAGE, IMAGE, 9)],
        "alone": [(IMAGE, 9)],
        "two_images": [(IMAGE, IMAGE, 7)],
        "text": [(7,), (12,)],
    }
    two, one = (IMAGE, IMAGE, 7), (IMAGE, 6)
    pictures = ()  # what it makes of messages is like no other's
    word = small.IMAGE_TOKEN_ID - 1
    refused_layout = two
    refused_arrays = [
        (lambda a: {"qformer_input_ids": None}, "qformer_input_ids is missing"),
        (lambda a: {"qformer_input_ids": np.full((3, 5), 4)}, r"shape \(3, 5\).*each of 2 images or of 1 prompts"),
        (lambda a: {"qformer_attention_mask": np.ones((2, 15), int)}, r"qformer_attention_mask \(2, 15\)"),
        (
            lambda a: {"qformer_input_ids": np.full((2, 25), 4), "qformer_attention_mask": None},
            "25 tokens and the Q-Former reads 24",
        ),
        (
            lambda a: {"qformer_input_ids": np.full((2, 5), 13), "qformer_attention_mask": None},
            "qformer_input_ids holds 13; expected 0 to 12",
        ),
        (lambda a: {"pixel_values": np.zeros((2, 3, 14, 28), np.float32)}, r"expected \[images, 3, 28, 28\]"),
        (lambda a: short([small.IMAGE_TOKEN_ID] * 7 + [5]), "7 image tokens.*do not truncate"),
        (lambda a: short([small.IMAGE_TOKEN_ID] * 4 + [5]), "1 image placeholders and 2 images"),
        (lambda a: short([5] * 5, [5] * 5, [5] * 5), "3 prompts without placeholders and 2 images"),
    ]

    def config(self, text=None, vision=None, qformer=None, **overrides):
        return super().config(text, vision, qformer_config=self.qformer | (qformer or {}), **overrides)

    def build(self, folder, seed=11, **overrides):
        """The model in memory always has an `image_token_index`: transformers 5 cannot run without one."""
        model = super().build(None, seed, **overrides)
        generator = torch.Generator().manual_seed(seed)
        norm = model.language_model.model.norm.weight  # of either sign, see `checkpoints.randomize`
        norm.data *= torch.randn(norm.shape, generator=generator).sign()
        if folder is not None:
            model.save_pretrained(folder)
            if model.config.image_token_index is None:
                path = folder / "config.json"
                fields = json.loads(path.read_text())
                fields.pop("image_token_index", None)
                path.write_text(json.dumps(fields))
        return self.runnable(model)

    def runnable(self, model):
        """The model with a placeholder token, any one inside the vocabulary."""
        if model.config.image_token_index is None:
            model.config.image_token_index = model.config.text_config.vocab_size - 1
        return model

    def load(self, folder):
        model, report = super().load(folder)
        return self.runnable(model), report

    def image(self, config, part):
        return np.full(config.num_query_tokens, config.image_token_index)

    def pixels(self, config, generator, images):
        """Also the Q-Former's words, right-padded, the same for all images of a sample."""
        words = []
        for one in images:
            length = int(generator.integers(3, 12))
            words += [generator.integers(4, config.qformer_config.vocab_size, length)] * len(one)
        longest = max(map(len, words))
        return super().pixels(config, generator, images) | {
            "qformer_input_ids": np.stack([np.pad(row, (0, longest - len(row))) for row in words]),
            "qformer_attention_mask": np.stack([np.arange(longest) < len(row) for row in words]).astype(int),
        }

    def for_us(self, inputs, theirs, ours):
        """Our placeholder may be past the end of the vocabulary."""
        ids = inputs["input_ids"]
        return inputs | {"input_ids": np.where(ids == theirs.image_token_index, ours.image_token_id, ids)}

    def logits(self, theirs, inputs):
        """A prompt without images is the decoder's own."""
        return super().logits(theirs if "pixel_values" in inputs else theirs.language_model, inputs)

    def write_processor(self, folder, published):
        """Saves a processor in `folder` and returns that of transformers.

        Args:
            published: the first layout on the hub: no image token in the tokenizer, no `num_query_tokens`, single files
                for each part, and the name of the processor for videos.
        """
        (folder / "bert").mkdir()
        (folder / "bert" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
        reader = BertTokenizer.from_pretrained(folder / "bert")
        image_processor = BlipImageProcessorPil(size={"height": 28, "width": 28})
        kept = json.loads(small.build_processor().tokenizer.backend_tokenizer.to_str())
        del kept["model"]["vocab"]["<image>"]
        kept["added_tokens"] = [token for token in kept["added_tokens"] if token["content"] != "<image>"]
        names = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>")

        def tokenizer():
            return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(kept)), **names)

        if published:
            image_processor.save_pretrained(folder)
            tokenizer().save_pretrained(folder)
            reader.save_pretrained(folder / "qformer_tokenizer")
            name = {"processor_class": "InstructBlipVideoProcessor"}
            (folder / "processor_config.json").write_text(json.dumps(name))
        whole = InstructBlipProcessor(image_processor, tokenizer(), reader, num_query_tokens=QUERIES)
        if not published:
            whole.save_pretrained(folder)
        return whole

    def with_processor(self, folder):
        self.build(folder, 3)
        self.write_processor(folder, published=False)
        return LVLM.from_pretrained(folder)


def short(*prompts):
    """Prompts without padding."""
    return {"input_ids": np.array(prompts), "attention_mask": np.ones_like(prompts)}


INSTRUCTBLIP = InstructBlip("instructblip")
