"""The small model that tests of generation share: sizes, a tokenizer of single bytes, prompts."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from lvlm_jax.pocket.tokenizer import CHAT_TEMPLATE
from tests.checkpoints import IMAGE

SPECIALS = ("<pad>", "<s>", "</s>")
IMAGE_TOKEN_ID = len(SPECIALS) + 256  # the last entry of the vocabulary
CONTEXT = 96
IMAGE_TOKENS = 16

# Overrides of `checkpoints.make_llava`: two layers, grouped-query attention, a short context, no stop token.
OVERRIDES = {"text": {"vocab_size": IMAGE_TOKEN_ID + 1, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}}

# No image, one, two; all fit in 64 columns with at most 16 rows after the last image.
MIXED = [(4, IMAGE, 3), (9,), (2, IMAGE, 1, IMAGE, 6)]


def build_processor() -> LlavaProcessor:
    """LLaVA's processor over a byte-level tokenizer without merges: any token sequence is text of a kind."""
    words = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "<image>"]
    bare = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    bare.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def write_processor(folder: Path) -> None:
    build_processor().save_pretrained(str(folder))


def conversation(text: str, seed: int | None = None) -> list[dict]:
    """One user message: a random picture, unless `seed` is None, then `text`."""
    parts = [{"type": "text", "text": text}]
    if seed is not None:
        picture = np.random.default_rng(seed).integers(0, 256, (28, 28, 3), dtype=np.uint8)
        parts.insert(0, {"type": "image", "image": picture})
    return [{"role": "user", "content": parts}]


def encoded(model, conversations: list[list[dict]]) -> list[list[dict]]:
    """Those conversations with the picture of each encoded by the model."""
    pictures = model.encode_images([one[0]["content"][0]["image"] for one in conversations])
    contents = [
        [{"type": "image", "image": image}, one[0]["content"][1]]
        for one, image in zip(conversations, pictures, strict=True)
    ]
    return [[{"role": "user", "content": content}] for content in contents]
