"""AdaIAT: more attention to generated text in heads that distinguish real from hallucinated objects (CVPR 2026).

In the last row of layers 5 to 17, with T_g the columns of generated tokens, the newest among them:

    if Σ_h mean_{T_g} w_h < threshold_l:   w_hj <- w_hj (1 + α (M_lh - 1)) for j in T_g; then each head sums to 1 again

M_lh is a head's mean attention to T_g at real object tokens, divided by that at hallucinated ones. threshold_l is
halfway between the means of the sum Σ_h at real and at hallucinated tokens. M and threshold are fitted
(`lvlm fit adaiat`). α is 6. The last row of the prompt stays plain.

Differs from the authors' code in: the factor, which is never below 0 here; the object tokens, which `lvlm fit` finds
where the answers of a pair differ.

Rows: last. Stage: weights. A sample without an image is left alone. Cost: explicit attention in one row.
"""

from typing import ClassVar

import jax.numpy as jnp

from lvlm_jax.methods.base import Method, Strength, fitted, strength, switch
from lvlm_jax.methods.depth import layer_range
from lvlm_jax.methods.fitted import Fitted
from lvlm_jax.methods.registry import register
from lvlm_jax.methods.vti import needed


@register("adaiat")
class AdaIAT(Method):
    """Adaptive increased attention to generated text; see the module for the formula."""

    alpha: Strength = strength(6.0, "strength α: how much of M - 1 is added", low=0, per="head")
    start_layer: int | float = switch(5, "first edited layer (a float: share of the depth)")
    end_layer: int | float | None = switch(18, "the layer after the last edited one")
    layers: tuple[int, ...] | None = switch(None, "explicit layers, used instead")
    fitted: Fitted | None = fitted("ratios and thresholds, a file of lvlm fit adaiat")

    rows: ClassVar[str] = "last"

    def active(self, layer, num_layers, phase):
        return phase == "decode" and layer in layer_range(self.start_layer, self.end_layer, self.layers, num_layers)

    def weights(self, site, weights):
        fitted = needed(self)
        generated = site.generated[:, None, None]
        count = jnp.maximum(site.generated.sum(axis=-1), 1)
        attention = jnp.where(generated, weights, 0).sum(axis=(1, 2, 3)) / count
        low = (attention < fitted["thresholds"][site.layer]) & site.image.any(axis=-1)
        factor = jnp.maximum(1 + self.alpha * (fitted["ratios"][site.layer][:, None, None] - 1), 0)
        raised = jnp.where(generated, weights * factor, weights)
        total = raised.sum(axis=-1, keepdims=True)
        raised = raised / jnp.where(total > 0, total, 1)
        return jnp.where(low[:, None, None, None] & (total > 0), raised, weights)
