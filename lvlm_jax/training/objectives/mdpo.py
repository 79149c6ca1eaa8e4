"""mDPO (arXiv 2406.11839): DPO that cannot be learned from the text alone, because images are preferred too.

With Δ(y | m) = log π(y | m, x) - log π_ref(y | m, x) summed over the tokens of an answer, m the images of a pair, and
m' other images:

    L =  -log σ(β (Δ(y_w | m) - Δ(y_l | m)))      the text pair: DPO
         -log σ(β (Δ(y_w | m) - Δ(y_w | m')))     the image pair: the same answer, other images
         -log σ(β Δ(y_w | m) - δ)                 the anchor: the chosen answer does not become less likely

m' are the row's `rejected_images`; without them, each image is replaced by a random part of it, 1 to 20 % of its area,
enlarged to its size. δ is 0 in the paper.
"""

import functools
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from lvlm_jax.errors import LVLMError
from lvlm_jax.lvlm import LVLM
from lvlm_jax.training import loop, pairwise
from lvlm_jax.training.data import pair_files
from lvlm_jax.training.data.pair_batches import PAIR, Batch, EncodedRow, Encoder
from lvlm_jax.training.data.pair_files import Pair, assistant
from lvlm_jax.training.data.pictures import Cropped
from lvlm_jax.training.losses import Mean
from lvlm_jax.training.pairwise import Scorer
from lvlm_jax.training.preference_losses import per_pair, preferred
from lvlm_jax.training.registry import Check, Objective
from lvlm_jax.training.samples import Samples

OTHER = "other_pictures"  # the sequence of the chosen answer after other images
SEQUENCES = (*PAIR, OTHER)
TERMS = ("text", "image", "anchor")


def losses(
    policy: Float[Array, "B 3 A"],
    reference: Float[Array, "B 3 A"],
    mask: Bool[Array, "B 3 A"],
    weight: Float[Array, "B"],
    beta: float,
    delta: float = 0.0,
) -> dict[str, Mean]:
    """Losses and metrics of B pairs of answers of at most A tokens.

    Args:
        policy, reference: log-probabilities in nats of the tokens of the chosen answer, of the rejected one, and of the
            chosen one after other images.
        mask: which of the A places have a token.
        weight: weight of each pair; 0 leaves it out.
        delta: δ of the anchor.

    Returns:
        Per pair: the terms `text`, `image` and `anchor`; `rewards/chosen`, `rewards/rejected`, `rewards/other_pictures`
            (β Δ); `rewards/accuracy`: whether the chosen answer's reward is above the rejected one's; `image_accuracy`:
            whether it is above the reward after other images. A tie counts half.
    """
    rewards = beta * jnp.where(mask, policy - reference, 0.0).sum(axis=-1)
    chosen, rejected, other = rewards[:, 0], rewards[:, 1], rewards[:, 2]
    result = {
        "text": preferred(chosen - rejected),
        "image": preferred(chosen - other),
        "anchor": preferred(chosen - delta),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/other_pictures": other,
        "rewards/accuracy": (1 + jnp.sign(chosen - rejected)) / 2,
        "image_accuracy": (1 + jnp.sign(chosen - other)) / 2,
    }
    return {name: per_pair(values, weight) for name, values in result.items()}


def metrics(
    scorer: Scorer, settings: Mapping[str, float], trainable: Any, frozen: Any, batch: Batch, key: jax.Array | None
) -> dict[str, Mean]:
    """The loss and metrics of a batch, from `losses`. Pure.

    Args:
        scorer: scorer of the sequences `SEQUENCES`.
        settings: `beta` and `delta` of `losses`.
        trainable, frozen, key: as in `Scorer.beside_reference`.
    """
    policy, reference, mask = scorer.beside_reference(trainable, frozen, batch, key)
    return losses(policy, reference, mask, batch["weight"], **settings)


def encode(smallest: float, largest: float, seed: int, encoder: Encoder, pair: Pair) -> EncodedRow:
    """A pair's three sequences. Parts of images depend on the seed, the row's id and the image's number.

    Args:
        smallest, largest: limits of the area of a part, as shares of the image's area.

    Raises:
        LVLMError: as `Encoder.pair`.
    """
    others = pair.rejected_images
    if others is None:
        random = np.random.default_rng([seed, zlib.crc32(pair.id.encode())])
        others = tuple(_part(image, random, smallest, largest) for image in pair.images)
    texts = zip(SEQUENCES, (pair.chosen, pair.rejected, pair.chosen), strict=True)
    messages = {name: [*pair.prompt, assistant(text.strip())] for name, text in texts}
    return encoder.row(pair, messages, last_only=True, pictures={OTHER: others})


def _part(image: Path | bytes, random: np.random.Generator, smallest: float, largest: float) -> Cropped:
    side = np.sqrt(random.uniform(smallest, largest))
    left, upper = random.uniform(0, 1 - side, 2)
    return Cropped(image, tuple(float(edge) for edge in (left, upper, left + side, upper + side)))


def task(model: LVLM, module: nn.Module, config: ConfigDict, workdir: Path) -> loop.Task:
    """See `registry.Objective`; precomputed log-probabilities are kept in the folder `reference` of `workdir`."""
    own = config.mdpo
    encode_row = functools.partial(encode, own.smallest, own.largest, config.seed)
    samples = Samples.read(model, config, pair_files.read_pairs, encode_row, "preference pairs", "pairs.jsonl")
    scorer = Scorer(module, None, samples.image_count, SEQUENCES)
    samples = pairwise.with_reference(samples, scorer, own.reference, workdir)
    settings = {"beta": own.beta, "delta": own.delta}
    return samples.task(functools.partial(metrics, scorer, settings), dict.fromkeys(TERMS, 1.0))


def _check(config: ConfigDict) -> None:
    if config.mdpo.smallest > config.mdpo.largest:
        raise LVLMError(
            f"mdpo.smallest is {config.mdpo.smallest} and mdpo.largest {config.mdpo.largest}; expected smallest <= "
            "largest"
        )
    pairwise.check_reference("mdpo", config)


_SHARE = ("a share of the image's area, above 0 and below 1", lambda value: 0 < value < 1)

OBJECTIVE = Objective(
    "mdpo",
    task,
    section="mdpo",
    defaults={"beta": 0.1, "delta": 0.0, "smallest": 0.01, "largest": 0.2, "reference": "auto"},
    docs={
        "beta": pairwise.DOCS["beta"],
        "delta": "delta of the anchor: the reward that the chosen answer should have",
        "smallest": "area of the smallest part that replaces an image, as a share of the image's",
        "largest": "area of the largest part, as a share of the image's",
        "reference": pairwise.DOCS["reference"],
    },
    checks=(
        pairwise.BETA,
        pairwise.REFERENCE,
        Check("delta", "a number of at least 0", lambda value: value >= 0),
        Check("smallest", *_SHARE),
        Check("largest", *_SHARE),
    ),
    check=_check,
)
