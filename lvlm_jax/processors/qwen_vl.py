"""The processor of Qwen-VL (arXiv 2308.12966). The published processor is code in the model's repository, which
we never run.

The tokenizer is made from `qwen.tiktoken`, a list of byte sequences with their ranks: a regular expression splits text
into words, and in each word the pair of neighbours whose union has the lowest rank is merged, repeatedly.
"""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.models.qwen_vl import QwenVlConfig
from lvlm_jax.pixels import CLIP
from lvlm_jax.weights.checkpoint import read_optional

RANKS = "qwen.tiktoken"
FILES = (RANKS,)
END_OF_TEXT = "<|endoftext|>"
IMAGE_START, IMAGE_END, IMAGE_PAD = "<img>", "</img>", "<imgpad>"
CONTROLS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
BOXES = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
SPECIALS = (*CONTROLS, *BOXES, IMAGE_START, IMAGE_END, IMAGE_PAD)  # numbered after the ranks

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

_CONTENT = """\
{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set seen.images = seen.images + 1 -%}
{{ 'Picture ' ~ seen.images ~ ': <img><imgpad></img>\\n' }}
{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
"""

# Chat template by the `chat_format` of `generation_config.json`. Images are numbered throughout the conversation.
TEMPLATES = {
    # Qwen-VL-Chat.
    "chatml": (
        """\
{%- set seen = namespace(images=0) -%}
{%- if messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
"""
        + _CONTENT
        + """\
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
    ),
    # Qwen-VL continues a text: an answer follows directly after its question.
    "raw": (
        """\
{%- set seen = namespace(images=0) -%}
{%- for message in messages -%}
{%- if not loop.first and message['role'] != 'assistant' -%}{{ '\\n' }}{%- endif -%}
"""
        + _CONTENT
        + """\
{%- endfor -%}
"""
    ),
}


def load(folder: Path, config: QwenVlConfig) -> "QwenVlProcessor":
    """The processor of a checkpoint folder.

    Args:
        folder: has `qwen.tiktoken`, and `chat_template.jinja` or a `chat_format` in `generation_config.json`.
        config: the model's configuration.

    Raises:
        LVLMError: files are missing, malformed, or of another vocabulary than the configuration's.
    """
    tokenizer = build_tokenizer(read_ranks(folder / RANKS))
    start = tokenizer.convert_tokens_to_ids(IMAGE_START)
    if start != config.image_start_id:
        raise LVLMError(
            f"{folder / RANKS} makes {IMAGE_START} token {start}, and config.json has image_start_id "
            f"{config.image_start_id}; take both from the same repository"
        )
    template = chat_template(folder)
    return QwenVlProcessor(tokenizer, config.vision.image_size, config.tokens_per_image, template)


class QwenVlImages:
    """Turns images into pixels: stretched to a square, bicubic, then normalised with CLIP's mean and deviation.

    Attributes:
        side: side of the square, in pixels.
    """

    def __init__(self, side: int):
        self.side = side

    def __call__(self, images: Sequence[Image.Image], return_tensors: str = "np") -> dict[str, np.ndarray]:
        """`pixel_values`, `Float[I, 3, Y, X]`, of RGB images."""
        _check_kind(return_tensors)
        size = (self.side, self.side)
        pixels = np.stack([np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for image in images])
        pixels = pixels.astype(np.float32) / np.float32(255)
        pixels = (pixels - np.asarray(CLIP.mean, np.float32)) / np.asarray(CLIP.deviation, np.float32)
        return {"pixel_values": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))}

    def to_json_string(self) -> str:
        """The settings that determine an image's pixels."""
        return json.dumps(
            {"size": self.side, "resample": "bicubic", "image_mean": CLIP.mean, "image_std": CLIP.deviation}
        )


class QwenVlProcessor:
    """Chat template, tokenizer and image processor in one, with the interface of a transformers processor.

    Attributes:
        image_token: <imgpad>; the template writes one per image, and a call repeats it for every image token.
    """

    image_token = IMAGE_PAD

    def __init__(self, tokenizer: Any, side: int, tokens_per_image: int, chat_template: str):
        self.tokenizer = tokenizer
        self.image_processor = QwenVlImages(side)
        self.tokens_per_image = tokens_per_image
        self.chat_template = chat_template

    def apply_chat_template(self, messages: Sequence[dict], **options: Any) -> Any:
        """A conversation as text (or tokens): see `apply_chat_template` of transformers' tokenizers."""
        return self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **options)

    def __call__(
        self, images: Sequence[Image.Image] | None = None, text: str = "", return_tensors: str = "np", **options: bool
    ) -> dict[str, np.ndarray]:
        """`input_ids` `[1, T]`, and `pixel_values` if there are images; `options` are the tokenizer's.

        Raises:
            LVLMError: not one <imgpad> per image.
        """
        _check_kind(return_tensors)
        images = images or []
        if text.count(IMAGE_PAD) != len(images):
            raise LVLMError(
                f"the text has {text.count(IMAGE_PAD)} {IMAGE_PAD} and {len(images)} images were given; "
                "give one image for each"
            )
        expanded = text.replace(IMAGE_PAD, IMAGE_PAD * self.tokens_per_image)
        arrays = {"input_ids": np.asarray([self.tokenizer(expanded, **options)["input_ids"]])}
        return arrays | (self.image_processor(images) if images else {})


def chat_template(folder: Path) -> str:
    """The chat template of a checkpoint folder: its own, or that of its `chat_format`.

    Raises:
        LVLMError: it has neither.
    """
    own, name = folder / "chat_template.jinja", "generation_config.json"
    if own.is_file():
        return files.read_text(own, "chat template")
    kind = read_optional(folder, name).get("chat_format")
    if kind not in TEMPLATES:
        raise LVLMError(
            f"chat_format in {folder / name} is {kind!r}; expected 'chatml' (Qwen-VL-Chat) or 'raw' (Qwen-VL): "
            "copy the file from the checkpoint's repository"
        )
    return TEMPLATES[kind]


def read_ranks(path: Path) -> dict[bytes, int]:
    """Reads a file of lines "base64 rank" as a dict from byte sequence to rank.

    Raises:
        LVLMError: the file is unreadable or malformed.
    """
    lines = files.read_bytes(path, "vocabulary").splitlines()
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            word, rank = line.split()
            ranks[base64.b64decode(word, validate=True)] = int(rank)
        except ValueError as error:
            raise LVLMError(f"line {number} of {path} is malformed; expected a base64 word and its rank") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise LVLMError(f"{path} does not rank each word once, from 0, with all 256 single bytes; is it complete?")
    return ranks


def build_tokenizer(ranks: dict[bytes, int]) -> PreTrainedTokenizerFast:
    """The tokenizer for a vocabulary of ranked byte sequences.

    Decoded text keeps the markers of boxes, which are part of Qwen-VL's answers; the other special tokens are left out.
    """
    converter = TikTokenConverter(pattern=WORDS)
    converter.load_tiktoken_bpe = lambda _: ranks  # replaces the package tiktoken
    bare = converter.converted()
    bare.normalizer = normalizers.NFC()
    bare.add_tokens([AddedToken(word, special=word not in BOXES, normalized=False) for word in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bare,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _check_kind(return_tensors: str) -> None:
    if return_tensors != "np":
        raise LVLMError(f"return_tensors is {return_tensors!r}; this processor returns NumPy arrays only ('np')")
