"""Tokens to text, and stop strings."""

from collections.abc import Sequence
from typing import Any

from lvlm_jax.errors import LVLMError

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
OWN_PROCESSOR_FILES = ("qwen.tiktoken",)  # what the processors read that are made here


def has_processor(folder: Path) -> bool:
    """Whether a checkpoint folder carries a processor."""
    return any((folder / name).is_file() for name in (*PROCESSOR_FILES, *OWN_PROCESSOR_FILES))


def load_processor(folder: Path, config: Any) -> Any:
    """The checkpoint's own processor, with the sizes that older checkpoints leave out taken from the model.

    A configuration with a `load_processor(folder)` makes its own, where transformers has none without remote code (None
    says that it has one); one with a `chat_template` lends it to a processor that has none.

    Raises:
        LVLMError: no processor files, or files that transformers cannot read.
    """
    own = config.load_processor(folder) if hasattr(config, "load_processor") else None
    if own is not None:
        return own
    if not has_processor(folder):
        raise LVLMError(
            f"{folder} has no processor ({' or '.join(PROCESSOR_FILES)}); give prepare() arrays, or copy the files "
            "from the checkpoint's Hugging Face repository"
        )
    try:
        processor = processor_class(config).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises whatever the first broken file provokes
        raise LVLMError(f"cannot read the processor of {folder}: {' '.join(str(error).split())}") from error
    if hasattr(config, "feature_select"):
        if getattr(processor, "patch_size", None) is None:
            processor.patch_size = config.vision.patch_size
        if getattr(processor, "vision_feature_select_strategy", None) is None:
            processor.vision_feature_select_strategy = config.feature_select
    if getattr(processor, "chat_template", None) is None:
        own = getattr(processor.tokenizer, "chat_template", None)
        processor.chat_template = own or getattr(config, "chat_template", None)
    if processor.chat_template is None:
        raise LVLMError(
            f"{folder} has no chat template (chat_template.jinja); copy it from the checkpoint's repository"
        )
    return processor


def words_tokenizer(processor: Any) -> Any:
    """The tokenizer of words put before a prompt: that of the images' instruction where a model has one of its own."""
    return getattr(processor, "qformer_tokenizer", processor.tokenizer)


def processor_class(config: Any) -> Any:
    """What reads a processor: transformers' class for the model, without its part for videos if it has one.

    A configuration with a `processor_name` takes another of its classes.

    Nothing here reads videos, and those parts need torchvision, without which transformers gives no processor at all.
    """
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    if hasattr(config, "processor_name"):
        return getattr(transformers, config.processor_name)
    own = getattr(transformers, PROCESSOR_MAPPING_NAMES.get(config.model_type, ""), None)
    attributes = own.get_attributes() if own else ()
    if "video_processor" not in attributes:
        return transformers.AutoProcessor
    return _without_videos(own)


def _without_videos(own: type) -> type:
    kept = [name for name in own.get_attributes() if name != "video_processor"]

    def reduced(processor: Any) -> tuple:
        return _revived, (own, vars(processor))  # no module holds the class below, for pickle to find it

    return type(
        own.__name__, (own,), {"get_attributes": classmethod(lambda cls: list(kept)), "__reduce__": reduced}
    )


def _revived(own: type, fields: dict[str, Any]) -> Any:
    """A processor without its part for videos, as it was before it went to another process."""
    processor = object.__new__(_without_videos(own))
    vars(processor).update(fields)
    return processor


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Text of generated tokens, without special tokens and surrounding blanks."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def first_stop(text: str, strings: Sequence[str]) -> int | None:
    """Where the stop string begins that is complete first, so that the answer does not depend on when one looks."""
    found = [(place + len(string), place) for string in strings if (place := text.find(string)) >= 0]
    return min(found)[1] if found else None


def tokens_before(tokenizer: Any, tokens: Sequence[int], cut: int) -> int:
    """How many leading tokens it takes to write the first `cut` characters."""
    return next(
        (count for count in range(len(tokens) + 1) if len(decode(tokenizer, tokens[:count])) >= cut),
        len(tokens),
    )


class StreamWriter:
    """Turns the growing text of an answer into pieces that never have to be taken back.

    Held back: what may be the beginning of a stop string, and the replacement character of a half-written letter.
    """

    def __init__(self, strings: Sequence[str]):
        self.strings = strings
        self.written = 0

    def push(self, text: str, final: bool) -> str:
        """The next piece of `text`, everything that is left if it is final."""
        end = len(text) if final else self._safe(text)
        piece = text[self.written : end]
        self.written = max(self.written, end)
        return piece

    def _safe(self, text: str) -> int:
        end = len(text.rstrip("�"))
        for string in self.strings:
            for size in range(min(len(string) - 1, end), 0, -1):
                if text[:end].endswith(string[:size]):
                    end -= size
                    break
        return end
