"""LLaVA's processor: it pads images to squares if the authors' configuration says so.

`image_aspect_ratio` is "pad" in every LLaVA-1.5 checkpoint of the authors: an image is centred on a square of the mean
colour before it is resized. Processor files from a `llava-hf` repository crop it instead.
"""

from pathlib import Path
from typing import Any

from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors import load as common


def load(folder: Path, config: FamilyConfig) -> Any:
    """Returns the checkpoint's processor with padding; None if the configuration does not ask for padding."""
    if config.hf.get("image_aspect_ratio") != "pad":
        return None
    # Imported here: the import is slow and not needed for a model without images.
    from transformers import LlavaImageProcessorPil

    processor = common.from_transformers(folder, config)
    settings = processor.image_processor.to_dict()
    for name in ("image_processor_type", "processor_class"):
        settings.pop(name, None)
    processor.image_processor = LlavaImageProcessorPil(**settings | {"do_pad": True})
    return processor
