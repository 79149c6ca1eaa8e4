"""Learns a method's strengths by gradient: `lvlm train --config learned_method --config.data=pairs.jsonl --workdir
DIR`.

The model is frozen. Pairs come from `lvlm preferences`, or are any that `dpo` accepts. The result is
`DIR/method.safetensors`; every command accepts it as `--method learned:DIR/method.safetensors`.

The fields of `config.learned`:

    method     whose strengths: the words of `--method`, several with + between them; strengths begin where they say
    per        "model": every strength is one number; "layer": one for each layer; "head": for each layer and head
    strengths  only these, as in "pai.alpha,omega"; empty: all that have a gradient. Counts, thresholds and seeds have
               none and stay as they are
    beta       how much log p(chosen) - log p(rejected) counts; at a β near 0 only the likelihood of chosen answers does
    nll        weight of the chosen answer's negative log-likelihood
    softness   of plausibility cuts while answers are scored, in nats; towards 0 they are the hard cuts of a generation

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
