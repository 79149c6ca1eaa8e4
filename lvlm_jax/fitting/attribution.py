"""Finds heads that favour the bad answer: the change of log p(bad) - log p(good) when a head's output is scaled.

Zero-ablation measures it exactly: one pass per head, with its output set to 0 (`by_ablation`). The first-order estimate
takes one gradient for all heads, at scale 1 (`by_gradient`). `lvlm fit adhh` uses both: the gradient proposes twice as
many heads as will be listed, and ablation of these selects the heads.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax import LVLM
from lvlm_jax.fitting.forced import SIDES, ForcedBatch, forced, producing, targets
from lvlm_jax.generation import forward
from lvlm_jax.generation.state import Prompt
from lvlm_jax.methods import Method, data
from lvlm_jax.methods.base import frozen
from lvlm_jax.training.data.pair_files import Pair

LISTED = 20  # heads that AD-HH switches off in a model of 1024 heads, as many as the authors list for LLaVA-1.5-7B
HEADS = 1024
CANDIDATES = 10  # heads to ablate in a small model


@frozen
class HeadScales(Method):
    """Multiplies every head's output by its own factor, in all rows."""

    scales: jax.Array | None = data("factors, [L, H]")

    rows = "all"

    def weights(self, site, weights):
        return weights * self.scales[site.layer][None, :, None, None]


@functools.partial(jax.jit, static_argnames=("config", "tail_rows", "image_count"))
def _log_likelihood(
    scales: Float[Array, "L H"],
    params: dict,
    config,
    prompt: Prompt,
    rows: Bool[Array, "B T"],
    tokens: Int[Array, "B T"],
    tail_rows: int,
    image_count: int,
) -> Float[Array, ""]:
    """log p of all answers, given every head's scale."""
    logits, _ = forward.full_forward(params, config, prompt, HeadScales(scales), tail_rows, image_count)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens[..., None], axis=-1)[..., 0]
    return jnp.where(rows, chosen, 0).sum()


_gradient = jax.jit(jax.grad(_log_likelihood.__wrapped__), static_argnames=("config", "tail_rows", "image_count"))


def _call(function, model: LVLM, batch: ForcedBatch, scales: Float[Array, "L H"]) -> jax.Array:
    rows = jnp.asarray(producing(batch))
    return function(scales, model.params, model.config, batch.prompt, rows, targets(batch), **batch.static)


def ones(model: LVLM) -> Float[Array, "L H"]:
    """Scale 1 for every head."""
    return jnp.ones((model.config.text.num_layers, model.config.text.num_heads))


def by_gradient(model: LVLM, pairs: Sequence[Pair]) -> Float[np.ndarray, "L H"]:
    """The gradient of log p(bad) - log p(good), summed over the pairs, with respect to the scale of each head."""
    good, bad = (_call(_gradient, model, forced(model, pairs, side), ones(model)) for side in SIDES)
    return np.asarray(bad - good)


def by_ablation(
    model: LVLM, pairs: Sequence[Pair], heads: Sequence[tuple[int, int]] | None = None
) -> Float[np.ndarray, "L H"]:
    """How much log p(bad) - log p(good), summed over the pairs, falls if one head at a time is 0.

    Args:
        heads: (layer, head) of the heads to ablate, by default all; other heads are 0 in the result.
    """
    inputs = {side: forced(model, pairs, side) for side in SIDES}

    def favour(scales: Float[Array, "L H"]) -> float:
        good, bad = (float(_call(_log_likelihood, model, inputs[side], scales)) for side in SIDES)
        return bad - good

    unablated = favour(ones(model))
    fall = np.zeros(ones(model).shape)
    for layer, head in np.ndindex(*fall.shape) if heads is None else heads:
        fall[layer, head] = unablated - favour(ones(model).at[layer, head].set(0))
    return fall


def adhh_collect(model: LVLM, pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
    """The gradient's attribution for a batch."""
    return {"gradients": by_gradient(model, pairs)[None], "pairs": np.array([len(pairs)])}


def adhh_confirm(model: LVLM, pairs: Sequence[Pair], collected: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The ablations of a batch, for the heads that the gradients of all batches propose."""
    gradients = collected["gradients"].sum(axis=0)
    first = np.argsort(-gradients, axis=None, kind="stable")[: max(CANDIDATES, 2 * _count(gradients))]
    heads = [tuple(map(int, np.unravel_index(place, gradients.shape))) for place in first]
    proposed = np.zeros((1, *gradients.shape), bool)
    proposed[0, *np.transpose(heads)] = True
    return {"ablations": by_ablation(model, pairs, heads)[None], "proposed": proposed}


def adhh_finish(collected: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Mean scores by gradient and by ablation, the heads that were ablated, and the heads that are listed.

    The list has the same proportion of heads as that of AD-HH's authors, and only heads that favour the bad answer by
    ablation.
    """
    count, proposed = collected["pairs"].sum(), collected["proposed"][0]
    gradients, ablations = (collected[name].sum(axis=0) / count for name in ("gradients", "ablations"))
    ranked = np.where(proposed, ablations, -np.inf)
    least = np.sort(ranked, axis=None)[-_count(ranked)]
    return {
        "scores": gradients.astype(np.float32),
        "ablations": ablations.astype(np.float32),
        "ablated": proposed,
        "listed": (ranked >= least) & (ranked > 0),
    }


def _count(scores: Float[np.ndarray, "L H"]) -> int:
    """How many heads to list."""
    return max(1, round(scores.size * LISTED / HEADS))
