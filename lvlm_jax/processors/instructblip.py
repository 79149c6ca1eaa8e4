"""The processor of InstructBLIP, assembled from the files of a checkpoint.

transformers' own class is not used, because published checkpoints name the class of InstructBLIP for videos.
InstructBLIP has no chat template: a prompt is the plain question, and `CHAT_TEMPLATE` adds only image markers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, BlipImageProcessorPil

from lvlm_jax.errors import library_errors
from lvlm_jax.models.family import FamilyConfig

IMAGE = "<image>"

# Turns follow each other: an answer is on the line of its question.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ ' ' if message['role'] == 'assistant' else '\\n' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def load(folder: Path, config: FamilyConfig) -> "InstructBlipProcessor":
    """Loads a checkpoint's image processor and its two tokenizers.

    Raises:
        LVLMError: files are missing or unreadable.
    """
    del config
    parts = {"image_processor": (BlipImageProcessorPil, folder), "tokenizer": (AutoTokenizer, folder)}
    parts["qformer_tokenizer"] = (AutoTokenizer, folder / "qformer_tokenizer")
    read = {}
    for name, (kind, place) in parts.items():
        advice = (
            "; copy the files (also the folder qformer_tokenizer) from the checkpoint's Hugging Face repository, or "
            "give prepare() arrays"
        )
        with library_errors(f"cannot read the {name} of {folder}", advice):
            read[name] = kind.from_pretrained(place, local_files_only=True)
    return InstructBlipProcessor(**read)


class InstructBlipProcessor:
    """Processes the text and images of a conversation; replaces transformers' `InstructBlipProcessor`.

    The tokenised text has no placeholders: they are put at the front later (`InstructBlipConfig.placed`).
    """

    image_token = IMAGE

    def __init__(self, image_processor: Any, tokenizer: Any, qformer_tokenizer: Any):
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.qformer_tokenizer = qformer_tokenizer
        self.chat_template = getattr(tokenizer, "chat_template", None) or CHAT_TEMPLATE

    def apply_chat_template(self, messages: Sequence[Mapping], **options: Any) -> Any:
        """Renders messages as a transformers tokenizer does, with the template of InstructBLIP."""
        return self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **options)

    def __call__(
        self, images: Sequence[Any] | None = None, text: str = "", return_tensors: str = "np", **options: bool
    ) -> dict[str, Any]:
        """Returns `input_ids` [1, T], `qformer_input_ids` [1, L], its mask, and with images `pixel_values` [I, 3, Y,
        X].

        `options` are those of the decoder's tokenizer.
        """
        text = text.replace(IMAGE, "")
        instruction = self.qformer_tokenizer(text)
        arrays: dict[str, Any] = {
            "input_ids": [self.tokenizer(text, **options)["input_ids"]],
            "qformer_input_ids": [instruction["input_ids"]],
            "qformer_attention_mask": [instruction["attention_mask"]],
        }
        arrays = {name: np.asarray(value) for name, value in arrays.items()}
        if images:
            arrays |= self.image_processor(images=images, return_tensors=return_tensors)
        return arrays
