"""ORPO on a file of pairs: `lvlm train --config orpo --config.data=pairs.jsonl --workdir runs/orpo`.

Answers are learned and preferred at once, so no supervised run before it is needed, and there is no reference model.
"""

from ml_collections import ConfigDict

from lvlm_jax.training import settings


def get_config() -> ConfigDict:
    """LoRA of rank 16 on the language model, one epoch of 16 pairs a step; λ 0.1."""
    return settings.base("orpo")
