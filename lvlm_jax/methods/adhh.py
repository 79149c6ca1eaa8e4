"""AD-HH: switches off hallucination heads while they attend to the text after the images (ICLR 2025).

In the last row, if a listed head h puts at least mass τ on the columns after the last image (prompt text and answer),
its weights on those columns become 0. The other weights are not renormalised:

    if Σ_{j >= E} w_hj >= τ:   w_hj <- 0  for j >= E        τ 0.4

Heads are listed in `heads` (presets: the authors' lists for LLaVA-1.5-7B and 13B), or selected by `lvlm fit adhh`,
which takes those that raise log p(hallucinated answer) - log p(good answer) most.

Differs from the authors' code in: how `lvlm fit` selects heads, which ablates only those that one gradient proposes.

Rows: last. Stage: weights. A sample without an image is left alone. Cost: explicit attention in one row.
"""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from lvlm_jax.errors import LVLMError
from lvlm_jax.methods.base import Method, Strength, fitted, strength, switch
from lvlm_jax.methods.fitted import Fitted
from lvlm_jax.methods.registry import register
from lvlm_jax.methods.vti import needed

# The authors' lists: layer, head, layer, head, …
SEVEN_B = (16, 29, 26, 9, 13, 31, 15, 10, 20, 12, 30, 9, 19, 18, 17, 0, 18, 9, 26, 28,
           19, 27, 18, 26, 15, 25, 14, 16, 31, 26, 15, 24, 31, 3, 22, 20, 27, 29, 17, 28)  # fmt: skip
THIRTEEN_B = (0, 8, 29, 27, 23, 18, 20, 11, 36, 26, 19, 37, 22, 16, 22, 34, 21, 31, 20, 34,
              37, 11, 17, 25, 35, 10, 17, 5, 15, 26, 0, 22, 19, 5, 19, 0, 14, 1, 23, 20,
              21, 6, 30, 24, 26, 27, 21, 32, 15, 28, 15, 31, 19, 30, 20, 8, 19, 14, 14, 9,
              39, 26, 25, 1, 18, 32, 17, 27, 39, 32)  # fmt: skip


@register("adhh")
class ADHH(Method):
    """Adaptive deactivation of hallucination heads; see the module for the formula."""

    tau: Strength = strength(
        0.4, "mass τ on text from which a head is switched off; above 1: never", low=0, flat="a threshold"
    )
    heads: tuple[int, ...] | None = switch(None, "the heads, as layer, head, layer, head, …")
    fitted: Fitted | None = fitted("a file of lvlm fit adhh with the heads; `heads` takes precedence")

    PRESETS: ClassVar = {"llava-1.5-7b": dict(heads=SEVEN_B), "llava-1.5-13b": dict(heads=THIRTEEN_B)}
    rows: ClassVar[str] = "last"

    def weights(self, site, weights):
        text = site.after_image[:, None]
        mass = jnp.where(text, weights[:, :, -1], 0).sum(axis=-1, keepdims=True)
        off = self.listed(site.layer, site.num_layers, weights.shape[1])[:, None] & (mass >= self.tau)
        return jnp.where((off & text)[:, :, None], 0, weights)

    def listed(self, layer: int, num_layers: int, num_heads: int):
        """Which heads of a layer are listed, `Bool[Array, "H"]`.

        Raises:
            LVLMError: no heads are listed, or the model does not have a listed head.
        """
        if self.heads is None:
            return needed(self)["listed"][layer]
        pairs = np.asarray(self.heads, np.int64)
        if pairs.size % 2 or not pairs.size:
            raise LVLMError(f"ADHH: heads has {pairs.size} numbers; expected layer, head, layer, head, …")
        pairs = pairs.reshape(-1, 2)
        if not ((pairs >= 0) & (pairs < (num_layers, num_heads))).all():
            raise LVLMError(
                f"ADHH: heads lists heads that do not exist; the model has layers 0 to {num_layers - 1} and heads 0 to "
                f"{num_heads - 1}"
            )
        return jnp.asarray(np.isin(np.arange(num_heads), pairs[pairs[:, 0] == layer, 1]))
