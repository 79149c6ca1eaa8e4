"""The processor of a checkpoint that has only a tokenizer."""

from pathlib import Path
from typing import Any

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors.templates import reason

FILES = ("tokenizer.json", "tokenizer.model")


class TextProcessor:
    """A tokenizer with the interface of a processor, for text without images.

    Attributes:
        tokenizer: the transformers tokenizer.
        chat_template: the tokenizer's chat template.
        image_token: a string that no text contains.
    """

    image_token = "<no image>"

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.chat_template = tokenizer, tokenizer.chat_template

    def __call__(self, text: str, images: Any = None, **options: Any) -> dict[str, Any]:
        """Token ids of a text."""
        if images:
            raise LVLMError("this is a language model without a vision tower; leave the images out")
        return self.tokenizer([text], **options)

    def apply_chat_template(self, messages: list[dict], **options: Any) -> str:
        """The text that the chat template writes for messages."""
        return self.tokenizer.apply_chat_template(messages, **options)


def load(folder: Path, config: FamilyConfig) -> TextProcessor:
    """The checkpoint's tokenizer, as a processor.

    Raises:
        LVLMError: it is unreadable, or has no chat template.
    """
    # Imported here: the import is slow and not needed for arrays.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the first broken file causes
        raise LVLMError(f"cannot read the tokenizer of {folder}: {reason(error)}") from error
    if tokenizer.chat_template is None:
        raise LVLMError(f"the tokenizer of {folder} has no chat template; give prepare() token ids instead")
    return TextProcessor(tokenizer)
