"""Measures how likely held-out answers are under methods, against no method or another one.

    python tools/likelihood.py --pairs runs/held/pairs.jsonl --methods learned:runs/learned0/method.safetensors

Prints one line of JSON per method: means over the pairs, with their standard errors, of `nll`, the negative
log-likelihood of the chosen answers in nats per token, and of `margin`, log p(chosen) - log p(rejected); of their
paired differences to `--against`; and `accuracy`, the share of pairs with a margin above 0. The plausibility cuts
of the methods are soft, as in training: a hard cut gives some answers the likelihood 0.
"""

import argparse
import json

import jax
import numpy as np
from jaxtyping import Float

from lvlm_jax import LVLM
from lvlm_jax.cli import common
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods import Method
from lvlm_jax.methods.cuts import soften
from lvlm_jax.methods.parse import method_for
from lvlm_jax.training import settings
from lvlm_jax.training.data import pair_files
from lvlm_jax.training.data.batches import Batches
from lvlm_jax.training.objectives import learned_method
from lvlm_jax.training.objectives.learned_method import Scored, prompted_row
from lvlm_jax.training.samples import Samples


def log_likelihoods(
    model: LVLM, samples: Samples, method: Method | None, size: int
) -> dict[str, Float[np.ndarray, " P"]]:
    """`nll` and `margin` of every pair.

    Args:
        size: pairs per batch.
    """
    rows, soft = samples.train, None if method is None else soften(method, 1.0)
    source = Scored(Batches(rows, samples.encoder, size, 1, 0), model, soft)
    score = jax.jit(
        lambda params, forced: learned_method.likelihoods(params, model.config, forced, soft, samples.image_count)
    )
    chunks = [rows[first : first + size] for first in range(0, len(rows), size)]
    scored = [score(model.params, source.of(chunk, range(len(chunk)), size)["opened"]) for chunk in chunks]
    each = (np.concatenate(batches)[: len(rows)] for batches in zip(*scored, strict=True))
    return dict(zip(("nll", "margin"), each, strict=True))


def mean(values: np.ndarray) -> list[float]:
    """Mean and standard error."""
    return [round(float(values.mean()), 5), round(float(values.std(ddof=1) / len(values) ** 0.5), 5)]


def main(words: list[str]) -> int:
    """Prints a line per method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="checkpoint (default pocket)")
    parser.add_argument("--pairs", required=True, help="pairs.jsonl of held-out pairs")
    parser.add_argument("--methods", nargs="+", default=[], help="methods, written as for --method")
    parser.add_argument(
        "--against", default="none", metavar="METHOD", help="the method that they are compared with (default none)"
    )
    parser.add_argument("--batch-size", type=common.number(int, 1), default=24, help="pairs per batch (default 24)")
    flags = parser.parse_args(words)
    model = LVLM.from_pretrained(flags.model)
    config = settings.base("learned_method")
    config.data = flags.pairs
    samples = Samples.read(model, config, pair_files.read_pairs, prompted_row, "preference pairs", "pairs.jsonl")
    if len(samples.train) < 2:
        raise LVLMError(f"{flags.pairs} has one pair; a standard error needs at least two")
    base = None
    for name in [flags.against, *flags.methods]:
        method = method_for(name, lambda: model.hash, flags.model)
        values = log_likelihoods(model, samples, method, flags.batch_size)
        base = base or values
        line = {"method": name, "pairs": len(values["nll"]), "accuracy": round(float((values["margin"] > 0).mean()), 4)}
        for figure, each in values.items():
            line |= {figure: mean(each), f"{figure} difference": mean(each - base[figure])}
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    common.run(main)
