"""KTO on labelled answers: `lvlm train --config kto --config.data=answers.jsonl --workdir runs/kto`.

Rows are {"images", "prompt", "completion", "label": true or false}; in pairs, chosen answers are good and rejected ones
bad.
"""

from ml_collections import ConfigDict

from lvlm_jax.training import settings


def get_config() -> ConfigDict:
    """LoRA of rank 16 on the language model, one epoch of 16 answers a step; β 0.1."""
    return settings.base("kto")
