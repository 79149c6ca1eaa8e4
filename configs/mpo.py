"""Several losses at once on a file of pairs: `lvlm train --config mpo --config.data=pairs.jsonl --workdir runs/mpo`.

InternVL's MPO (arXiv 2411.10442) adds a preference loss, a quality loss and the likelihood of chosen answers with the
weights 0.8, 0.2 and 1. Its quality loss is BCO's with a moving shift; `bco_pair` here, as in TRL, has no shift.
"""

from ml_collections import ConfigDict

from lvlm_jax.training import settings


def get_config() -> ConfigDict:
    """LoRA of rank 16 on the language model, one epoch of 16 pairs a step, plain attention."""
    config = settings.base("dpo")
    config.preference.loss = "0.8*sigmoid + 0.2*bco_pair + sft"
    return config
