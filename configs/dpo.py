"""DPO on a file of pairs: `lvlm train --config dpo --config.data=pairs.jsonl --workdir runs/dpo`.

Other losses: `--config.preference.loss=ipo`, or another of `lvlm train --config dpo --help`; several with weights:
`"0.8*sigmoid + 0.2*bco_pair + sft"`. Conservative DPO: `--config.preference.label_smoothing=0.1`.
"""

from ml_collections import ConfigDict

from lvlm_jax.training import settings


def get_config() -> ConfigDict:
    """LoRA of rank 16 on the language model, one epoch of 16 pairs a step, plain attention."""
    return settings.base("dpo")
