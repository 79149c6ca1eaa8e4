"""Converts a checkpoint with any naming scheme and weight format into a Hugging Face safetensors folder."""

from os import PathLike
from pathlib import Path

from lvlm_jax import models
from lvlm_jax.weights import lora, names
from lvlm_jax.weights.checkpoint import resolve_checkpoint
from lvlm_jax.weights.load import load_parameters, read_config
from lvlm_jax.weights.peft import load_adapter
from lvlm_jax.weights.save import save_checkpoint


def convert(
    source: str,
    target: str | PathLike,
    dtype: str | None = None,
    scheme: str = "hub",
    vision_tower: str | None = None,
    processor: str | None = None,
    adapter: str | None = None,
    max_shard_size: int = 5_000_000_000,
    overwrite: bool = False,
) -> Path:
    """Reads a checkpoint and writes it as a folder of safetensors.

    Args:
        source: checkpoint folder or hub id.
        target: the folder to write.
        dtype: dtype of the tensors; None keeps each tensor's own.
        scheme: tensor names to write, see `save_checkpoint`.
        vision_tower: CLIP folder or hub id, for an original LLaVA checkpoint that comes without its tower.
        processor: folder or hub id to take tokenizer and processor from; None: the source.
        adapter: PEFT LoRA adapter (folder or hub id) to merge into the weights.
        max_shard_size: bytes of the largest file.
        overwrite: replace an existing checkpoint in the target.

    Returns:
        The folder.

    Raises:
        LVLMError: source, adapter or target cannot be used; the message says why.
    """
    folder = resolve_checkpoint(names.checkpoint(source))
    processor_folder = resolve_checkpoint(names.checkpoint(processor)) if processor else folder
    config = models.config_from_hf(read_config(folder, vision_tower))
    params = load_parameters(folder, config, dtype, vision_tower=vision_tower)
    if adapter:
        params = lora.merge(load_adapter(adapter, params, config))
    return save_checkpoint(
        target,
        params,
        config,
        processor_source=processor_folder,
        dtype=dtype,
        scheme=scheme,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
