"""Learns a method's strengths by gradient: `lvlm train --config learned_method --config.data=pairs.jsonl --workdir
DIR`.

The model is frozen. Pairs come from `lvlm preferences`, or are any that `dpo` accepts. The result is
`DIR/method.safetensors`; every command accepts it as `--method learned:DIR/method.safetensors`.

The fields of `config.learned`:

    method     the methods whose strengths are learned, as for `--method`; given values are the start values
    per        "model": every strength is one number; "layer": one for each layer; "head": for each layer and head
    strengths  the strengths to learn, as in "pai.alpha,omega"; empty: all that have a gradient. Counts, thresholds and
               seeds have none and stay as they are
    beta       factor on log p(chosen) - log p(rejected); near 0, only the likelihood of chosen answers counts
    nll        weight of the chosen answer's negative log-likelihood
    softness   softness of plausibility cuts, in nats; towards 0 they become the hard cuts of a generation

In the log: `nll` in nats per token, `margin` (log p(chosen) - log p(rejected)), `accuracy` (the share of pairs with a
positive margin), and `preference`, the loss beside `nll`.
"""

from ml_collections import ConfigDict

from lvlm_jax.training import settings


def get_config() -> ConfigDict:
    """PAI, SEVI and VAF chained, one value per layer; three epochs of 16 pairs per step."""
    config = settings.base("learned_method")
    config.epochs = 3.0
    config.learned.method = "pai+sevi+vaf"
    config.learned.per = "layer"
    return config
