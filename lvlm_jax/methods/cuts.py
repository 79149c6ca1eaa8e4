"""Tokens that a method rules out: for good while answers are written, softly while answers that are known are scored.

A hard cut gives a token that it rules out the logit -inf, so that a true token may have no likelihood, and β no
gradient. With the softness τ, in nats, a logit falls instead with the distance from the cut,

    l^_v + log σ((l_v - max l - ln β) / τ)

which is the hard cut as τ goes to 0.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Soft:
    """A strength that rules tokens out, such as β, and how softly; stands where the number would."""

    value: Any  # arrays, or what JAX puts in their place while it rebuilds a tree
    softness: Any


def plausible(
    logits: Float[Array, "B V"], main: Float[Array, "B V"], beta: float | np.floating | jax.Array | Soft
) -> Float[Array, "B V"]:
    """Adaptive plausibility (arXiv 2210.15097): `logits` of tokens whose `main` logit is at least max + ln β.

    Others get -inf; all fall softly where β is `Soft`.
    """
    value = beta.value if isinstance(beta, Soft) else beta
    floor = main.max(axis=-1, keepdims=True) + jnp.log(jnp.asarray(value, jnp.float32))
    return kept(logits, main, main >= floor, floor, beta)


def kept(
    logits: Float[Array, "B V"],
    main: Float[Array, "B V"],
    stay: Bool[Array, "B V"],
    floor: Float[Array, "B 1"],
    cut: Any,
) -> Float[Array, "B V"]:
    """`logits` where tokens stay, -inf elsewhere; under a `Soft` cut the lower, the further `main` is below `floor`."""
    if isinstance(cut, Soft):
        return logits + jax.nn.log_sigmoid((main - floor) / cut.softness)
    return jnp.where(stay, logits, -jnp.inf)


def softened(method: Any, softness: float | jax.Array) -> Any:
    """A method whose strengths that rule tokens out do so softly, in the members of a chain too."""
    members = getattr(method, "members", ())
    if members:
        return dataclasses.replace(method, members=tuple(softened(member, softness) for member in members))
    cuts = {
        field.name: Soft(getattr(method, field.name), softness)
        for field in dataclasses.fields(method)
        if field.metadata.get("cuts")
    }
    return dataclasses.replace(method, **cuts)
