"""Strengths of a method as unbounded numbers for an optimizer; a bijection keeps each strength within its bounds.

With s₀ the start value of a strength and θ the learned number, which starts at 0:

    low ≤ s           s = low + (s₀ - low) softplus(θ + c) / softplus(c)      c = ln(e - 1), so that softplus(c) = 1
    low ≤ s ≤ high    s = low + (high - low) σ(θ + logit((s₀ - low) / (high - low)))
    no bounds         s = s₀ + max(|s₀|, 0.1) θ

So a step of a given size changes every strength by a similar share of its value. Bounds are approached and never
reached, and a strength cannot start at a bound.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax.attention.layered import Layered
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods import Method
from lvlm_jax.methods.base import FORMS
from lvlm_jax.methods.learned import name_of

ONE = math.log(math.e - 1)  # softplus(ONE) = 1
SMALLEST = 0.1  # scale of a step if an unbounded strength starts near 0

Theta = Mapping[str, Mapping[str, jax.Array | np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Learnable:
    """One learned strength of one member (one of the methods of `Strengths`).

    Attributes:
        member: number of the member.
        group: name of the member's parameters, such as "0_pai".
        name: name of the field.
        low, high: bounds of the strength.
        start: start value of the strength: a number, or values `[L]` or `[L, H]`.
        layers: layers in which the member acts; None if the strength is one number.
    """

    member: int
    group: str
    name: str
    low: float
    high: float
    start: np.ndarray
    layers: tuple[int, ...] | None

    def theta(self) -> np.ndarray:
        """The start value of θ: 0 for every learned value."""
        return np.zeros_like(self.start if self.layers is None else self.start[list(self.layers)])

    def value(self, theta: jax.Array | np.ndarray) -> Any:
        """The strength in the form of its field; layers in which the member does not act keep the start value."""
        if self.layers is None:
            return self._bounded(theta, self.start)
        places = np.asarray(self.layers)
        return Layered(jnp.asarray(self.start).at[places].set(self._bounded(theta, self.start[places])))

    def _bounded(self, theta: jax.Array | np.ndarray, start: np.ndarray) -> jax.Array:
        if math.isinf(self.low):
            return start + np.maximum(np.abs(start), SMALLEST) * theta
        if math.isinf(self.high):
            return self.low + (start - self.low) * jax.nn.softplus(theta + ONE)
        share = (start - self.low) / (self.high - self.low)
        return self.low + (self.high - self.low) * jax.nn.sigmoid(theta + np.log(share) - np.log1p(-share))


@dataclasses.dataclass(frozen=True)
class Strengths:
    """The learned strengths of some methods.

    Attributes:
        members: the methods, with their start values.
        learnables: the learned strengths.
    """

    members: tuple[Method, ...]
    learnables: tuple[Learnable, ...]

    @classmethod
    def of(
        cls, members: Sequence[Method], per: str, num_layers: int, num_heads: int, names: Sequence[str] = ()
    ) -> "Strengths":
        """The strengths that have a gradient, in the finest form that the methods and `per` allow.

        Args:
            per: one of FORMS.
            num_layers, num_heads: numbers of layers and heads of the model.
            names: the strengths to learn, as "alpha" or "pai.alpha"; empty: all that have a gradient.

        Raises:
            LVLMError: a method is a search; a strength does not exist, has no gradient, or starts at its bound; or no
                strength can be learned.
        """
        names_left, learnables = set(names), []
        for index, member in enumerate(members):
            word = name_of(member)
            if member.search is not None:
                raise LVLMError(f"{member.label} is a search, so its answers have no likelihood; leave it out")
            for field in dataclasses.fields(member):
                own_names = {field.name.strip("_"), f"{word}.{field.name.strip('_')}"} & set(names)
                if "flat" not in field.metadata or (names and not own_names):
                    continue
                names_left -= own_names
                reason = _unlearnable(member, field)
                if reason and own_names:
                    raise LVLMError(f"{word}.{field.name} {reason} and has no gradient; leave it out")
                if not reason:
                    learnables.append(_learnable(index, word, member, field, per, num_layers, num_heads))
        if names_left:
            raise LVLMError(
                f"no method has a strength {', '.join(sorted(names_left))}; expected one of {_known(members)}"
            )
        if not learnables:
            raise LVLMError("none of these methods has a strength with a gradient; name others")
        return cls(tuple(members), tuple(learnables))

    def start(self) -> dict[str, dict[str, np.ndarray]]:
        """The θ with which training starts, by group and name."""
        tree: dict[str, dict[str, np.ndarray]] = {}
        for one in self.learnables:
            tree.setdefault(one.group, {})[one.name] = one.theta()
        return tree

    def members_at(self, theta: Theta) -> tuple[Method, ...]:
        """The methods with the strengths that θ gives."""
        members = list(self.members)
        for one in self.learnables:
            change = {one.name: one.value(theta[one.group][one.name])}
            members[one.member] = dataclasses.replace(members[one.member], **change)
        return tuple(members)

    def refuse_unmoved(self, theta: Theta) -> None:
        """Refuses a run in which a strength has not changed after the first steps: it has no gradient there.

        Raises:
            LVLMError: a strength has not changed; the message names it.
        """
        changed = [bool(np.any(np.asarray(theta[one.group][one.name]))) for one in self.learnables]
        pairs = zip(self.learnables, changed, strict=True)
        still = [f"{one.group.partition('_')[2]}.{one.name}" for one, any_moved in pairs if not any_moved]
        if still and any(changed):
            raise LVLMError(
                f"{', '.join(still)} had no gradient on these pairs, so nothing is learned; "
                "name the others in learned.strengths"
            )


def _unlearnable(member: Method, field: dataclasses.Field) -> str:
    """Why a strength has no gradient; "" if it has one."""
    if field.metadata["flat"]:
        return f"is {field.metadata['flat']}"
    switch, value = field.metadata["when"] or ("", None)
    return f"is used only with {switch}={value}" if switch and getattr(member, switch) != value else ""


def _learnable(
    index: int, word: str, member: Method, field: dataclasses.Field, per: str, num_layers: int, num_heads: int
) -> Learnable:
    start_value = getattr(member, field.name)
    form = min(per, field.metadata["per"], key=FORMS.index)
    start = np.asarray(start_value.values if isinstance(start_value, Layered) else start_value, np.float32)
    form = max(form, FORMS[start.ndim], key=FORMS.index)
    shape = {"model": (), "layer": (num_layers,), "head": (num_layers, num_heads)}[form]
    layers = None
    if form != "model":
        if start.shape[:1] not in ((), (num_layers,)):
            raise LVLMError(f"{word}.{field.name} has {len(start)} values and the model {num_layers} layers")
        start = np.broadcast_to(start.reshape(start.shape + (1,) * (len(shape) - start.ndim)), shape)
        layers = tuple(layer for layer in range(num_layers) if _acts(member, layer, num_layers))
    low, high = float(field.metadata["low"]), float(field.metadata["high"])
    if (start <= low).any() or (start >= high).any():
        raise LVLMError(
            f"{word}.{field.name} starts at its bound, {low if (start <= low).any() else high:g}, and could not leave "
            f"it; start inside, as in {word}:{field.name.strip('_')}={_inside(low, high):g}"
        )
    return Learnable(index, f"{index}_{word}", field.name, low, high, start, layers)


def _acts(member: Method, layer: int, num_layers: int) -> bool:
    """Whether a member's stages run in a layer; a member that does not choose its layers acts in all of them."""
    if hasattr(member, "edited"):
        return layer in member.edited(num_layers)
    if type(member).active is Method.active and not callable(member.layers):
        return True
    return any(member.active(layer, num_layers, phase) for phase in ("prefill", "decode"))


def _inside(low: float, high: float) -> float:
    return low + 0.1 * (min(high, low + 1) - low)


def _known(members: Sequence[Method]) -> str:
    fields = [(member, field) for member in members for field in dataclasses.fields(member) if "flat" in field.metadata]
    learnable = [(member, field) for member, field in fields if not _unlearnable(member, field)]
    return ", ".join(f"{name_of(member)}.{field.name}" for member, field in learnable)
