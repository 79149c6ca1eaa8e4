"""mDPO on a file of pairs: `lvlm train --config mdpo --config.data=pairs.jsonl --workdir runs/mdpo`.

Images are preferred too: the rejected ones come from `rejected_images`, or are small parts of the pair's own images.
"""

from ml_collections import ConfigDict

from lvlm_jax.training import settings


def get_config() -> ConfigDict:
    """LoRA of rank 16 on the language model, one epoch of 16 pairs a step; β 0.1."""
    return settings.base("mdpo")
