"""M3ID, and a port of it: contrast with the prompt without images, which grows with every token. arXiv 2403.14003.

With l and l~ the next-token logits of the prompt with and without its images, p and p~ their distributions, t the
number of tokens generated before (kept in memory) and g = e^{-λ t}:

    variant="paper"   l + (1 - g) / g (ln p - ln p~)   where max p < α, else l; no plausibility cut
    variant="port"    l + (1 - g) / g (l - l~)         where l >= max l + ln β, else -inf; no gate

"port" is RITUAL's port (arXiv 2405.17821), used in most published tables. λ is `decay`, α is `alpha_gate`. The first
token is never contrasted. The factor (1 - g) / g = e^{λ t} - 1 stops growing at e^80, where float32 would overflow.

Differs from the paper in: the default of α, which is ours because we do not know the paper's. There is no authors'
code.

Rows, layers, stages: none; the attention of both branches is plain. A sample without an image is left alone.
Cost: a second, shorter prompt, and one more row through the weights per token.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from lvlm_jax.methods.base import Method, Readout, Strength, strength, switch
from lvlm_jax.methods.contrast import ImagePresence, contrast_logits, where_image
from lvlm_jax.methods.registry import register

LARGEST_EXPONENT = 80.0


@register("m3id")
class M3ID(Method):
    """Multi-modal mutual-information decoding, and RITUAL's port of it; see the module for the formulas."""

    decay: Strength = strength(0.02, "forgetting rate λ of the image, per token", low=0)
    alpha_gate: Strength = strength(
        0.9,
        "'paper': contrast only if every token is less probable than this",
        low=0,
        high=1,
        flat="a threshold",
        when=("variant", "paper"),
    )
    beta: Strength = strength(0.1, "'port': plausibility cut β", low=0, high=1, cuts=True, when=("variant", "port"))
    variant: str = switch("paper", "formulas of the paper or of RITUAL's port", choices=("paper", "port"))

    PRESETS: ClassVar = {"paper": dict(decay=0.02, variant="paper"), "port": dict(decay=0.02, beta=0.1, variant="port")}

    def branches(self):
        return (ImagePresence(), None)

    def contrast_prompt(self) -> str:
        return "no_image"

    def start(self, batch: int):
        return jnp.zeros((batch,))

    def combine(self, readout: Readout, memory):
        main, contrast = readout.main, readout.contrast
        weight = jnp.expm1(jnp.minimum(self.decay * memory, LARGEST_EXPONENT))[:, None]
        if self.variant == "port":
            combined = contrast_logits(main, contrast, weight, self.beta)
        else:
            log_p, log_blind = jax.nn.log_softmax(main), jax.nn.log_softmax(contrast)
            unsure = jnp.exp(log_p.max(axis=-1, keepdims=True)) < self.alpha_gate
            combined = main + jnp.where(unsure, weight * (log_p - log_blind), 0)
        return where_image(readout.carry, combined, main), memory + 1
