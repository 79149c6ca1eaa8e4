"""Supervised fine-tuning: `lvlm train --config sft --config.data=talks.jsonl --workdir runs/sft`.

The file has rows `{"images": [...], "messages": [...]}`, or preference pairs, whose chosen answers are learned.
"""

from ml_collections import ConfigDict

from lvlm_jax.training import settings


def get_config() -> ConfigDict:
    """LoRA of rank 16 on the language model, one epoch of 16 conversations a step."""
    config = settings.base("sft")
    config.optimizer.peak = 2e-5
    return config
