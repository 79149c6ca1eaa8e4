"""Cuts, the rules that exclude tokens: hard while answers are written, soft while known answers are scored.

A hard cut gives a token the logit -inf. Then a correct token may have no likelihood, and β has no gradient. With the
softness τ, in nats, a logit decreases with its distance from the cut instead,

    l^_v + log σ((l_v - max l - ln β) / τ)

which becomes the hard cut as τ goes to 0.
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
    """A strength that excludes tokens, such as β, with the softness of its cut; used in place of a number."""

    value: Any  # arrays, or whatever JAX puts in their place while it rebuilds a tree
    softness: Any


def plausible(
    logits: Float[Array, "B V"], main: Float[Array, "B V"], beta: float | np.floating | jax.Array | Soft
) -> Float[Array, "B V"]:
    """Adaptive plausibility (arXiv 2210.15097): `logits` of tokens whose `main` logit is at least max + ln β.

    Other tokens get -inf. If β is `Soft`, all logits decrease softly instead.
    """
    value = beta.value if isinstance(beta, Soft) else beta
    floor = main.max(axis=-1, keepdims=True) + jnp.log(jnp.asarray(value, jnp.float32))
    return cut_logits(logits, main, main >= floor, floor, beta)


def cut_logits(
    logits: Float[Array, "B V"],
    main: Float[Array, "B V"],
    stay: Bool[Array, "B V"],
    floor: Float[Array, "B 1"],
    cut: Any,
) -> Float[Array, "B V"]:
    """`logits` where `stay` is true, -inf elsewhere.

    Under a `Soft` cut, each logit is lowered instead; the further `main` is below `floor`, the more.
    """
    if isinstance(cut, Soft):
        return logits + jax.nn.log_sigmoid((main - floor) / cut.softness)
    return jnp.where(stay, logits, -jnp.inf)


def soften(method: Any, softness: float | jax.Array) -> Any:
    """A copy of a method, or of a chain, whose cuts are soft."""
    members = getattr(method, "members", ())
    if members:
        return dataclasses.replace(method, members=tuple(soften(member, softness) for member in members))
    cuts = {
        field.name: Soft(getattr(method, field.name), softness)
        for field in dataclasses.fields(method)
        if field.metadata.get("cuts")
    }
    return dataclasses.replace(method, **cuts)
