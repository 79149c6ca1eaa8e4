"""Loading a checkpoint's processor: through transformers, or through a file of this folder named after the family.

Where transformers has no class, or none that works without remote code, `processors/<model_type>.py` holds a function
`load(folder, config)` that makes a processor; it may return None and leave a checkpoint to transformers. A constant
`FILES` in it names the files that tell of a processor, where they are not transformers' own.
"""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from lvlm_jax.errors import LVLMError, library_errors
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors import rendering
from lvlm_jax.weights.checkpoint import read_optional

BACKEND = "pil"  # what image processors work with, whatever is installed
FILES = ("processor_config.json", "preprocessor_config.json")
_WORDS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")


def has_processor(folder: Path, config: FamilyConfig) -> bool:
    """Whether a checkpoint folder of a model of this configuration carries a processor."""
    names = getattr(_own(config), "FILES", FILES)
    return any((folder / name).is_file() for name in names)


def load_processor(folder: Path, config: FamilyConfig) -> Any:
    """The checkpoint's own processor, with the fields that older checkpoints leave out taken from the configuration.

    Raises:
        LVLMError: no processor files, or files that cannot be read.
    """
    rendering.RENDERER.start()  # gets ready meanwhile
    own = _own(config)
    processor = None if own is None else own.load(folder, config)
    return from_transformers(folder, config) if processor is None else processor


def from_transformers(folder: Path, config: FamilyConfig) -> Any:
    """The checkpoint's processor as transformers reads it; see `load_processor`."""
    if not has_processor(folder, config):
        raise LVLMError(
            f"{folder} has no processor ({' or '.join(FILES)}); give prepare() arrays, or copy the files from the "
            "checkpoint's Hugging Face repository"
        )
    if not any((folder / name).is_file() for name in _WORDS):  # some of transformers' tokenizers are empty then
        raise LVLMError(
            f"{folder} has no tokenizer (looked for {', '.join(_WORDS)}); copy it from the checkpoint's Hugging Face "
            "repository"
        )
    with library_errors(f"cannot read the processor of {folder}"):
        processor = processor_class(config).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not hasattr(processor, "tokenizer"):  # transformers falls back on a tokenizer, or on what reads images
        raise LVLMError(
            f"the processor of {folder} is a {type(processor).__name__}, not one of images and text; take "
            "processor_class from the checkpoint's repository"
        )
    given = read_optional(folder, FILES[0])
    for name, value in config.processor_fields.items():
        if given.get(name) is None:  # what transformers takes then fits few models
            setattr(processor, name, value)
    _use_pillow(processor, folder)
    if getattr(processor, "chat_template", None) is None:
        processor.chat_template = getattr(processor.tokenizer, "chat_template", None)
    if processor.chat_template is None:
        raise LVLMError(
            f"{folder} has no chat template (chat_template.jinja); copy it from the checkpoint's repository"
        )
    return processor


def _use_pillow(processor: Any, folder: Path) -> None:
    """Replaces an image processor that works with torchvision, whose pixels differ by a grey level.

    transformers takes it wherever torchvision is installed, so the same model would see something else there.

    Raises:
        LVLMError: transformers has none that works with Pillow.
    """
    import transformers

    images = getattr(processor, "image_processor", None)
    if BACKEND != images_backend(images):
        with library_errors(f"cannot read the image processor of {folder}"):
            ours = transformers.AutoImageProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, backend=BACKEND
            )
        if images_backend(ours) != BACKEND:
            raise LVLMError(
                f"transformers has no image processor of {folder} that works with Pillow ({type(ours).__name__}); "
                "give prepare() arrays instead"
            )
        processor.image_processor = ours


def images_backend(image_processor: Any) -> str:
    """What an image processor works with: "torchvision", or "pil" for anything else."""
    torchvision = any(kind.__name__ == "TorchvisionBackend" for kind in type(image_processor).__mro__)
    return "torchvision" if torchvision else BACKEND


def words_tokenizer(processor: Any) -> Any:
    """The tokenizer of words put before a prompt: that of the images' instruction where a model has one of its own."""
    return getattr(processor, "qformer_tokenizer", processor.tokenizer)


def _own(config: FamilyConfig) -> ModuleType | None:
    """The file of this folder named after the family; None where there is none."""
    name = f"{__package__}.{config.model_type}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def processor_class(config: FamilyConfig) -> Any:
    """What reads a processor: transformers' class for the model, without its part for videos if it has one.

    Nothing here reads videos, and those parts need torchvision, without which transformers gives no processor at all.
    """
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    if config.processor_name is not None:
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

    return type(own.__name__, (own,), {"get_attributes": classmethod(lambda cls: list(kept)), "__reduce__": reduced})


def _revived(own: type, fields: dict[str, Any]) -> Any:
    """A processor without its part for videos, as it was before it went to another process."""
    processor = object.__new__(_without_videos(own))
    vars(processor).update(fields)
    return processor
