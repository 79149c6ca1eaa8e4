"""Statistics of heads and layers: vision sinks (EAH, arXiv 2411.09968), drift to noise (CLVA, arXiv 2603.25088)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lvlm_jax.analysis.flow import divergence
from lvlm_jax.errors import LVLMError


def sink_density(
    attention: Float[Array, "L B H S S"], image_id: Int[Array, "B S"], beta: float = 0.002
) -> Float[Array, "L B H"]:
    """The share of image columns that are vision sinks of a head.

        c_h[j] = Σ_{x > j, x a row of j's image} w_h[x, j] / (number of those rows),   sink if c_h[j] > β

    EAH uses the map of the head with most sinks. Its β of 0.002 is for 576 image tokens, for which uniform attention
    gives about 0.003 on average; the equivalent for N tokens is 0.002 · 576 / N.

    Args:
        attention: weights of all rows, `Tap(layers=..., rows="all")`.
        image_id: the kind of each row and column, as in `Context`.
        beta: the threshold β.

    Returns:
        The share of each head, between 0 and 1; zero in a sample without an image.
    """
    image = image_id > 0
    places = jnp.arange(image_id.shape[1])
    same = image[:, :, None] & (image_id[:, :, None] == image_id[:, None, :])
    later = same & (places[:, None] > places[None, :])[None]
    count = later.sum(1)
    mean_received = jnp.where(later[None, :, None], attention, 0.0).sum(-2)
    sinks = (mean_received / jnp.maximum(count, 1)[None, :, None] > beta) & image[None, :, None]
    return sinks.sum(-1) / jnp.maximum(image.sum(-1), 1)[None, :, None]


class Drift(NamedTuple):
    """How each layer's attention to an image compares with that of the early layers and of the best middle layer.

    `drift_curve` defines the symbols.

    Attributes:
        noise: cos(p^l, n).
        anchor: cos(p^l, A); zero if A is zero.
        gate: clip(noise - anchor, 0, 1), the drift on which CLVA acts in its late layers, here for every layer; zero
            if A is zero.
        anchor_layer: l*.
    """

    noise: Float[Array, "L"]
    anchor: Float[Array, "L"]
    gate: Float[Array, "L"]
    anchor_layer: Int[Array, ""]


def drift_curve(
    attention: Float[Array, "L H N"], strength: float = 1.0, kept_share: float = 0.1, early: int = 3
) -> Drift:
    """Whether attention drifts back to the noise of the first layers: our reconstruction of CLVA's statistics.

        p^l = head-maximum of w on one image's columns, normalised to sum 1;   n = mean of p^0, p^1, p^2
        l*  = argmax over l in [0.3 L, 0.6 L] of JSD(p^l, n) · (1 - H(p^l) / ln N)
        A   = relu(p^{l*} - λ n), its largest ρN entries

    The paper describes CLVA's idea without formulas. The first layers make up n, and all
    of them except the last are excluded from l*.

    Args:
        attention: one row's weights on the N tokens of one image; use `jax.vmap` for several rows or images.
        strength: λ.
        kept_share: ρ; at least one entry is kept.
        early: number of first layers that make up the noise n.

    Raises:
        LVLMError: the model is so shallow that no layer lies between the early and the late ones.
    """
    depth, _, tokens = attention.shape
    strongest = jnp.asarray(attention, jnp.float32).max(1)
    total = strongest.sum(-1, keepdims=True)
    looks = strongest / jnp.where(total > 0, total, 1.0)
    noise = looks[:early].mean(0)
    entropy = -(looks * jnp.log(jnp.where(looks > 0, looks, 1.0))).sum(-1)
    score = divergence(looks, noise[None]) * (1 - entropy / math.log(max(tokens, 2)))
    layers = jnp.arange(depth)
    # Floating point must not decide whether 0.6 of 5 layers includes layer 3.
    first = max(math.ceil(0.3 * depth - 1e-9), early - 1)
    middle = (layers >= first) & (layers <= 0.6 * depth + 1e-9)
    if first > 0.6 * depth + 1e-9:
        raise LVLMError(
            f"drift_curve looks for anchors in layers {first} to {0.6 * depth:.1f} of {depth}, but there are none; "
            "use a deeper model or fewer early layers"
        )
    anchor_layer = jnp.argmax(jnp.where(middle, score, -jnp.inf))
    rest = jax.nn.relu(looks[anchor_layer] - strength * noise)
    least = jax.lax.top_k(rest, max(1, math.floor(kept_share * tokens + 1e-6)))[0][-1]
    anchor = jnp.where(rest >= least, rest, 0.0)
    to_noise, to_anchor = _cosine(looks, noise), _cosine(looks, anchor)
    gate = jnp.where(anchor.max() > 0, jnp.clip(to_noise - to_anchor, 0, 1), 0.0)
    return Drift(to_noise, to_anchor, gate, anchor_layer)


def _cosine(rows: Float[Array, "L N"], direction: Float[Array, "N"]) -> Float[Array, "L"]:
    product = jnp.einsum("LN,N->L", rows, direction, precision=jax.lax.Precision.HIGHEST)
    length = jnp.linalg.norm(rows, axis=-1) * jnp.linalg.norm(direction)
    return product / jnp.where(length > 0, length, 1.0)
