"""SimPO on a file of pairs: `lvlm train --config simpo --config.data=pairs.jsonl --workdir runs/simpo`.

There is no reference model: a step has one forward pass instead of DPO's two, and full fine-tuning
(`--config.lora.enabled=False`) needs no second copy. For full fine-tuning, the authors recommend learning rates from
3e-7 to 1e-6, and ratios γ/β from 0 to 1.
"""

from ml_collections import ConfigDict

from lvlm_jax.training import settings


def get_config() -> ConfigDict:
    """LoRA of rank 16 on the language model, one epoch of 16 pairs a step; β 2 and γ 0.5."""
    return settings.base("simpo")
