"""DoLa: the final distribution against that of an early layer. arXiv 2309.03883.

With p the final next-token distribution and p_i the one that hidden state i gives through the head, i* is the
early exit of largest Jensen-Shannon divergence ½ KL(p | m) + ½ KL(p_i | m), m = ½ (p + p_i), chosen per sample and
step (the first on ties), and

    ln p - ln p_{i*}      where p >= β max p

`layers` selects the early exits, numbered as Hugging Face's `hidden_states`: "low", the even ones below half the depth;
"high", the even ones from there up to but not including the last; or explicit numbers. For 32 layers: 0, 2, ..., 14 and
16, ..., 30. `variant="paper"` puts the final norm before the head, `variant="code"` does not.

Differs from the paper in: nothing known. The paper does not say whether an exit passes the final norm. We assume that
it does, like the last hidden state, because the head was trained after that norm; this is the default. Differs from the
authors' code in: nothing known under "code". The authors sample with a repetition penalty of 1.2; pass it to
`generate`.

Images play no part: samples without one are treated alike. Rows, layers, stages: none. Cost: the head once more for
every early exit.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lvlm_jax.errors import LVLMError
from lvlm_jax.methods.base import Method, Readout, Strength, strength, switch
from lvlm_jax.methods.cuts import plausible
from lvlm_jax.methods.depth import layer_range
from lvlm_jax.methods.registry import register


@register("dola")
class DoLa(Method):
    """Decoding by contrasting layers; see the module for the formulas."""

    beta: Strength = strength(0.1, "plausibility cut β", low=0, high=1, cuts=True)
    layers: str | tuple[int, ...] = switch("low", "early exits: 'low', 'high' or hidden states")
    variant: str = switch("paper", "with or without the final norm", choices=("paper", "code"))

    PRESETS: ClassVar = {"low": dict(layers="low"), "high": dict(layers="high")}

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.layers, str) and self.layers not in ("low", "high"):
            raise LVLMError(f"DoLa: layers is {self.layers!r}; expected 'low', 'high' or hidden-state indices")

    @property
    def exit_norm(self) -> bool:
        return self.variant == "paper"

    def exits(self, num_layers: int) -> tuple[int, ...]:
        even = range(0, num_layers, 2)
        chosen = {
            "low": tuple(index for index in even if 2 * index < num_layers),
            "high": tuple(index for index in even if 2 * index >= num_layers),
        }.get(self.layers, self.layers)
        return layer_range(0, None, chosen, num_layers)

    def combine(self, readout: Readout, memory):
        final = jax.nn.log_softmax(readout.main, axis=-1)
        early = jax.nn.log_softmax(readout.exits, axis=-1)
        index = divergence(final, early).argmax(axis=0)
        chosen = jnp.take_along_axis(early, index[None, :, None], axis=0)[0]
        return plausible(final - chosen, final, self.beta), memory


def divergence(final: Float[Array, "B V"], early: Float[Array, "X B V"]) -> Float[Array, "X B"]:
    """Jensen-Shannon divergence, in nats, between distributions given as log-probabilities."""
    middle = jnp.logaddexp(final, early) - jnp.log(2.0)
    to_final = (jnp.exp(final) * (final - middle)).sum(axis=-1)
    to_early = (jnp.exp(early) * (early - middle)).sum(axis=-1)
    return (to_final + to_early) / 2
