"""What a method is: a frozen dataclass whose numbers are array leaves and whose switches are static.

    @register("dim")
    class Dim(Method):
        kappa: Strength = strength(0.5, "share of the image logits that is taken away")

        def logits(self, site, logits):
            return jnp.where(site.image[:, None, None, :], logits * (1 - self.kappa), logits)

`Dim(kappa=0.3)` can be passed to every call of the public face, swept, `vmap`ped and differentiated; changing
`kappa` recompiles nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lvlm_jax.attention import Transform
from lvlm_jax.attention.transform import STAGES, overrides
from lvlm_jax.errors import LVLMError

Strength = float | jax.Array

_REGISTRY: dict[str, type["Method"]] = {}


def strength(default: float | None, doc: str, low: float = -np.inf, high: float = np.inf) -> Any:
    """A numeric field of a method: an array leaf. Python numbers outside `[low, high]` are refused."""
    return dataclasses.field(default=default, metadata={"doc": doc, "low": low, "high": high})


def switch(default: Any, doc: str, choices: tuple | None = None) -> Any:
    """A static field of a method: part of its structure, so another value compiles another program."""
    return dataclasses.field(default=default, metadata={"doc": doc, "choices": choices, "static": True})


class Method(Transform):
    """Base class: greedy decoding with the (identity) attention stages of `Transform`.

    A method with one branch overrides stages and is its own transform. A contrastive one overrides `branches`
    and `combine`.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.metadata.get("static"):
                choices = field.metadata["choices"]
                if choices and value not in choices:
                    raise LVLMError(
                        f"{type(self).__name__}: {field.name} is {value!r}; expected one of "
                        + ", ".join(map(repr, choices))
                    )
            elif isinstance(value, int | float | np.number):
                self._check(field, value)
                object.__setattr__(self, field.name, np.float32(value))

    def _check(self, field: dataclasses.Field, value: float) -> None:
        low, high = field.metadata["low"], field.metadata["high"]
        if not low <= value <= high:
            raise LVLMError(
                f"{type(self).__name__}: {field.name} is {value}; expected a number in [{low}, {high}]"
            )

    @classmethod
    def preset(cls, name: str) -> "Method":
        """The method with published settings.

        Raises:
            LVLMError: there is no preset of that name.
        """
        if name not in cls.PRESETS:
            raise LVLMError(
                f"{cls.__name__} has no preset {name!r}; expected one of {', '.join(cls.PRESETS)}"
            )
        return cls(**cls.PRESETS[name])

    def branches(self) -> tuple[Transform | None, ...]:
        """The attention edits of the main branch and, if there is one, of the contrast branch; static structure."""
        return (self if any(overrides(self, stage) for stage in STAGES) else None,)

    def positions(
        self, position: Int[Array, "..."], images_before: Int[Array, "..."], image_tokens: Int[Array, "..."]
    ) -> Float[Array, "..."] | None:
        """Where post-image rows, which keep their ordinary positions, see each image token; None for where it is.

        Rotary attention depends on differences of positions alone, so a method that moves rows as well moves image
        tokens by the opposite amount here. Elementwise; one answer for all layers and branches.

        Args:
            position: ordinary positions of the image tokens.
            images_before: how many image tokens of the sample come strictly before each.
            image_tokens: how many image tokens the sample has.
        """
        return None

    def start(self, batch: int) -> Any:
        """Memory from step to step of a generation of `batch` samples (a pytree of arrays)."""
        return ()

    def combine(
        self, main: Float[Array, "B V"], contrast: Float[Array, "B V"] | None, carry: Any, memory: Any
    ) -> tuple[Float[Array, "B V"], Any]:
        """Next-token logits from those of the branches.

        Args:
            main, contrast: raw logits of the branches; `contrast` is None without a second branch.
            carry: the main branch's carry after the last layer.
            memory: what `start` or the step before returned.

        Returns:
            Logits to sample from, -inf where a token is ruled out, and the memory for the next step.
        """
        return main, memory


@dataclass_transform(frozen_default=True, field_specifiers=(strength, switch))
def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: makes a method a frozen dataclass and a pytree, and lets the command line name it."""

    def decorate(cls: type[Method]) -> type[Method]:
        cls = dataclasses.dataclass(frozen=True)(cls)
        jax.tree_util.register_dataclass(cls)
        _REGISTRY[name] = cls
        return cls

    return decorate


def get(name: str) -> type[Method]:
    """The method class registered under a name.

    Raises:
        LVLMError: no method of that name.
    """
    if name not in _REGISTRY:
        raise LVLMError(f"there is no method {name!r}; expected one of {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]


def names() -> list[str]:
    """All registered method names, sorted."""
    return sorted(_REGISTRY)


def plausible(main: Float[Array, "B V"], beta: Strength) -> jax.Array:
    """Adaptive plausibility (arXiv 2210.15097): tokens whose raw logit is at least max + ln β."""
    return main >= main.max(axis=-1, keepdims=True) + jnp.log(jnp.asarray(beta, jnp.float32))


def contrasted(
    main: Float[Array, "B V"],
    contrast: Float[Array, "B V"],
    alpha: Float[Array, "#B #V"] | Strength,
    beta: Strength,
) -> Float[Array, "B V"]:
    """(1 + α) l - α l̃ on plausible tokens, -inf elsewhere."""
    return jnp.where(plausible(main, beta), (1 + alpha) * main - alpha * contrast, -jnp.inf)
