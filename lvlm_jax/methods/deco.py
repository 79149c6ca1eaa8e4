"""DeCo: corrects the final logits by the layer that is most confident of a likely token. arXiv 2410.11779.

Candidates are the fewest most likely tokens of the final distribution that together reach `top_p`, at most
`candidates` of them. Among the early exits (hidden states 20 to 28 of 32, numbered as Hugging Face's
`hidden_states`, through the final norm and the head; as shares of the depth, so that other depths work) the one that
gives any candidate the largest probability p* is chosen, per sample and step, and

    l + α p* l_layer   for candidates, -inf for all other tokens

This applies to greedy decoding, sampling and beams alike, as in the authors' code.

Differs from the paper and from the authors' code in: nothing known.

Images play no part: samples without one are treated alike. Rows, layers, stages: none. Cost: the head once more for
every early exit.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from lvlm_jax.methods.base import Method, Readout, Strength, strength, switch
from lvlm_jax.methods.cuts import Soft, cut_logits
from lvlm_jax.methods.depth import layer_range
from lvlm_jax.methods.likeliest import likeliest
from lvlm_jax.methods.registry import register


@register("deco")
class DeCo(Method):
    """Dynamic correction decoding; see the module for the formulas."""

    alpha: Strength = strength(0.6, "strength α of the correction", low=0)
    top_p: Strength = strength(
        0.9, "probability that the candidates reach together", low=0, high=1, flat="a number of tokens", cuts=True
    )
    candidates: Strength = strength(20, "largest number of candidates", low=1, flat="a number of tokens")
    start_layer: int | float = switch(20 / 32, "first early exit")
    end_layer: int | float | None = switch(29 / 32, "the hidden state after the last early exit")
    layers: tuple[int, ...] | None = switch(None, "explicit hidden states, used instead")

    PRESETS: ClassVar = {"default": dict(alpha=0.6, top_p=0.9, candidates=20)}

    def exits(self, num_layers: int) -> tuple[int, ...]:
        return layer_range(self.start_layer, self.end_layer, self.layers, num_layers)

    def combine(self, readout: Readout, memory):
        threshold = self.top_p.value if isinstance(self.top_p, Soft) else self.top_p
        # Even if rounding brings the sum to 1 before the last token, a top_p of 1 means all of them.
        enough = jnp.where(jnp.asarray(threshold) >= 1, jnp.inf, threshold)
        likely = likeliest(readout.main, jax.nn.softmax(readout.main, axis=-1), enough, self.candidates)
        sure = jnp.where(likely, jax.nn.softmax(readout.exits, axis=-1), 0).max(axis=-1)
        chosen = jnp.take_along_axis(readout.exits, sure.argmax(axis=0)[None, :, None], axis=0)[0]
        corrected = readout.main + self.alpha * sure.max(axis=0)[:, None] * chosen
        least = jnp.where(likely, readout.main, jnp.inf).min(axis=-1, keepdims=True)
        return cut_logits(corrected, readout.main, likely, least, self.top_p), memory
