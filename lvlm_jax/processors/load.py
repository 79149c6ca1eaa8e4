"""Loads a checkpoint's processor: with transformers, or with the file of this folder that is named after the family.

If transformers has no class, or none that works without remote code, `processors/<model_type>.py` has a function
`load(folder, config)` that makes a processor, or returns None to leave a checkpoint to transformers. Its constant
`FILES` names the files of a processor, if they are not those of transformers.
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

BACKEND = "pil"  # the backend of image processors, whatever is installed
FILES = ("processor_config.json", "preprocessor_config.json")
_WORDS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")


def has_processor(folder: Path, config: FamilyConfig) -> bool:
    """Whether a checkpoint folder contains a processor for a model of this configuration."""
    names = getattr(_family_module(config), "FILES", FILES)
    return any((folder / name).is_file() for name in names)


def load_processor(folder: Path, config: FamilyConfig) -> Any:
    """The checkpoint's own processor; fields that older checkpoints leave out come from the configuration.

    Raises:
        LVLMError: the processor's files are missing or unreadable.
    """
    rendering.RENDERER.start()  # starts in the background
    own = _family_module(config)
    processor = None if own is None else own.load(folder, config)
    return from_transformers(folder, config) if processor is None else processor


def from_transformers(folder: Path, config: FamilyConfig) -> Any:
    """The checkpoint's processor as transformers loads it; see `load_processor`."""
    if not has_processor(folder, config):
        raise LVLMError(
            f"{folder} has no processor ({' or '.join(FILES)}); give prepare() arrays, or copy the files from the "
            "checkpoint's Hugging Face repository"
        )
    if not any(
        (folder / name).is_file() for name in _WORDS
    ):  # without these, some of transformers' tokenizers are empty
        raise LVLMError(
            f"{folder} has no tokenizer (looked for {', '.join(_WORDS)}); copy it from the checkpoint's Hugging Face "
            "repository"
        )
    with library_errors(f"cannot read the processor of {folder}"):
        processor = processor_class(config).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not hasattr(processor, "tokenizer"):  # transformers may return a bare tokenizer or image processor instead
        raise LVLMError(
            f"the processor of {folder} is a {type(processor).__name__}, not one of images and text; take "
            "processor_class from the checkpoint's repository"
        )
    file_settings = read_optional(folder, FILES[0])
    for name, value in config.processor_fields.items():
        if file_settings.get(name) is None:  # transformers' defaults fit few models
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
    """Replaces an image processor that uses torchvision, because torchvision's pixels differ by one grey level.

    transformers prefers torchvision if it is installed, so the same model would get other pixels there.

    Raises:
        LVLMError: transformers has no image processor for Pillow.
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
    """The backend of an image processor: "torchvision", or "pil" for anything else."""
    torchvision = any(kind.__name__ == "TorchvisionBackend" for kind in type(image_processor).__mro__)
    return "torchvision" if torchvision else BACKEND


def words_tokenizer(processor: Any) -> Any:
    """The tokenizer for words before a prompt: the instruction's tokenizer if the model has a separate one."""
    return getattr(processor, "qformer_tokenizer", processor.tokenizer)


def _family_module(config: FamilyConfig) -> ModuleType | None:
    """The file of this folder that is named after the family, or None."""
    name = f"{__package__}.{config.model_type}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def processor_class(config: FamilyConfig) -> Any:
    """The class that loads a processor: transformers' class for the model, without a part for videos.

    Videos are not supported here, and that part needs torchvision, without which transformers would load no processor.
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
    names = [name for name in own.get_attributes() if name != "video_processor"]

    def reduced(processor: Any) -> tuple:
        return _rebuild, (own, vars(processor))  # pickle cannot find the class below in a module

    return type(own.__name__, (own,), {"get_attributes": classmethod(lambda cls: list(names)), "__reduce__": reduced})


def _rebuild(own: type, fields: dict[str, Any]) -> Any:
    """Rebuilds a processor without its part for videos after it was pickled."""
    processor = object.__new__(_without_videos(own))
    vars(processor).update(fields)
    return processor
