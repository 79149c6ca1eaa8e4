"""LLaVA's processor. The authors' checkpoints pad pictures to squares, which their configuration alone says.

`image_aspect_ratio` is "pad" in every LLaVA-1.5 of the authors: a picture is centred on a square of the mean colour
before it is resized. Processor files that were taken from a `llava-hf` repository crop it instead.
"""

from pathlib import Path
from typing import Any

from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors import load as common


def load(folder: Path, config: FamilyConfig) -> Any:
    """The checkpoint's processor, which pads if the configuration says so; None leaves it to transformers."""
    if config.hf.get("image_aspect_ratio") != "pad":
        return None
    # Imported here: slow to import, and not needed for a model without pictures.
    from transformers import LlavaImageProcessorPil

    processor = common.from_transformers(folder, config)
    settings = processor.image_processor.to_dict()
    for name in ("image_processor_type", "processor_class"):
        settings.pop(name, None)
    processor.image_processor = LlavaImageProcessorPil(**settings | {"do_pad": True})
    return processor
