"""Which heads favour the bad answer: the change of log p(bad) - log p(good) when a head's output is scaled.

By one gradient, at the scale 1, of all heads at once (w · ∂); `by_ablation` is what it stands for: the change when one
head's output is 0, a pass for each.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax import LVLM
from lvlm_jax.fitting.forced import SIDES, Forced, forced, producing, targets
from lvlm_jax.generation import forward
from lvlm_jax.generation.state import Prompt
from lvlm_jax.methods import Method, data
from lvlm_jax.methods.base import frozen
from lvlm_jax.training.data.pair_files import Pair

LISTED = 20  # heads that AD-HH switches off in a model of 1024, as many as the authors list for LLaVA-1.5-7B
HEADS = 1024


@frozen
class HeadScales(Method):
    """Every head's output times a factor of its own, in all rows."""

    scales: jax.Array | None = data("factors, [L, H]")

    rows = "all"

    def weights(self, site, weights):
        return weights * self.scales[site.layer][None, :, None, None]


@functools.partial(jax.jit, static_argnames=("config", "window", "image_count"))
def _log_likelihood(
    scales: Float[Array, "L H"],
    params: dict,
    config,
    prompt: Prompt,
    rows: Bool[Array, "B T"],
    tokens: Int[Array, "B T"],
    window: int,
    image_count: int,
) -> Float[Array, ""]:
    """log p of all answers, given every head's scale."""
    logits, _ = forward.full_forward(params, config, prompt, HeadScales(scales), window, image_count)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens[..., None], axis=-1)[..., 0]
    return jnp.where(rows, chosen, 0).sum()


_gradient = jax.jit(jax.grad(_log_likelihood.__wrapped__), static_argnames=("config", "window", "image_count"))


def _call(function, model: LVLM, given: Forced, scales: Float[Array, "L H"]) -> jax.Array:
    rows = jnp.asarray(producing(given))
    return function(scales, model.params, model.config, given.prompt, rows, targets(given), **given.static)


def ones(model: LVLM) -> Float[Array, "L H"]:
    """The scale of every head when nothing is scaled."""
    return jnp.ones((model.config.text.num_layers, model.config.text.num_heads))


def by_gradient(model: LVLM, pairs: Sequence[Pair]) -> Float[np.ndarray, "L H"]:
    """How much log p(bad) - log p(good), summed over the pairs, grows with the scale of each head."""
    good, bad = (_call(_gradient, model, forced(model, pairs, side), ones(model)) for side in SIDES)
    return np.asarray(bad - good)


def by_ablation(model: LVLM, pairs: Sequence[Pair]) -> Float[np.ndarray, "L H"]:
    """How much log p(bad) - log p(good), summed over the pairs, falls when each head alone is 0."""
    given = {side: forced(model, pairs, side) for side in SIDES}

    def favour(scales: Float[Array, "L H"]) -> float:
        good, bad = (float(_call(_log_likelihood, model, given[side], scales)) for side in SIDES)
        return bad - good

    whole = favour(ones(model))
    lost = np.zeros(ones(model).shape)
    for place in np.ndindex(*lost.shape):
        lost[place] = whole - favour(ones(model).at[place].set(0))
    return lost


def adhh_collect(model: LVLM, pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
    """The attribution of a batch."""
    return {"scores": by_gradient(model, pairs)[None], "pairs": np.array([len(pairs)])}


def adhh_finish(collected: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Mean scores, and which heads are listed: the share of them that AD-HH lists, if they favour the bad answer."""
    scores = collected["scores"].sum(axis=0) / collected["pairs"].sum()
    count = max(1, round(scores.size * LISTED / HEADS))
    least = np.sort(scores.ravel())[-count]
    return {"scores": scores.astype(np.float32), "listed": (scores >= least) & (scores > 0)}
