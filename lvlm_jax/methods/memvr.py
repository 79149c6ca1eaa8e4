"""MemVR: adds image tokens again when a middle layer is uncertain of the next token. arXiv 2410.03577.

After each layer i with 5 < i < 16, u_i is the entropy of the renormalised probabilities of the ten most likely next
tokens, divided by ln 10 (final norm and head on the last row). In the first layer i + 1 with u_i > τ the output of the
feed-forward block becomes, in all rows of the call,

    (1 - ρ) FFN(x) + ρ s A(x)      A(x) = (x Vᵀ) V      s = mean |FFN(x)| / mean |A(x)|

with V the image tokens at the decoder's input. The authors first scale V by the sizes of the block's matrices, but s
cancels that. At most one layer per call is edited. τ is 0.75; ρ is 0.12, for descriptions 0.31.

Differs from the authors' code in: means, which are per sample here and pool the batch and its padding there.

Rows: all. Stages: enter (u), mlp. A sample without an image is left alone.
Cost: the head for one row in each judged layer up to the edited one; two products with the image tokens in the edited
layer; memory for the image tokens.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lvlm_jax.attention import Context
from lvlm_jax.methods.base import Method, Strength, data, strength, switch
from lvlm_jax.methods.depth import layer_range
from lvlm_jax.methods.likeliest import likeliest
from lvlm_jax.methods.registry import register

CANDIDATES = 10


class Retrace(NamedTuple):
    """The carry of one pass through the layers.

    Attributes:
        visual: the image tokens, zero in other columns.
        valid: rows that contain a token and no padding.
        now: samples that this layer edits, because their uncertainty after the previous layer exceeds τ.
        done: samples that need no further edit: a layer up to this one edits them, or they have no image.
    """

    visual: Float[Array, "B N E"]
    valid: Bool[Array, "B T 1"]
    now: Bool[Array, "B"]
    done: Bool[Array, "B"]


@register("memvr")
class MemVR(Method):
    """Memory-space visual retracing; see the module for the formulas."""

    rho: Strength = strength(0.12, "share ρ of the image tokens in the edited output", low=0, high=1, per="layer")
    tau: Strength = strength(0.75, "entropy τ above which a layer is uncertain", low=0, flat="a threshold")
    start_layer: int | float = switch(6, "first layer whose output is judged (a float: share of the depth)")
    end_layer: int | float | None = switch(16, "the layer after the last one that is judged")
    layers: tuple[int, ...] | None = switch(None, "explicit layers instead")
    visual: jax.Array | None = data("image tokens of every sample; set by `recall`")

    PRESETS: ClassVar = {"default": dict(rho=0.12, tau=0.75), "chair": dict(rho=0.31, tau=0.75)}
    rows: ClassVar[str] = "last"

    def judged(self, layer: int, num_layers: int) -> bool:
        """Whether `layer` follows a layer whose output is judged; static."""
        return layer - 1 in layer_range(self.start_layer, self.end_layer, self.layers, num_layers)

    def active(self, layer, num_layers, phase):
        return self.judged(layer, num_layers)  # no attention stages, but only these layers are edited

    def begin(self, context: Context, embeddings):
        image = context.image_columns()
        visual = jnp.where(image[..., None], embeddings, 0) if self.visual is None else self.visual
        rows = jnp.take(context.image_id >= 0, context.rows(), axis=1)
        no_image = context.image_end == 0
        return Retrace(visual, rows[..., None], jnp.zeros_like(no_image), no_image)

    def enter(self, stream):
        if not self.judged(stream.layer, stream.num_layers):
            return stream.carry._replace(now=jnp.zeros_like(stream.carry.done))
        done = stream.carry.done

        def judge() -> Bool[Array, "B"]:
            logits = stream.exit_logits(stream.layer_input[:, -1])
            chosen = likeliest(logits, jnp.ones_like(logits), jnp.inf, CANDIDATES)
            probabilities = jax.nn.softmax(logits, axis=-1, where=chosen)
            return jax.scipy.special.entr(probabilities).sum(axis=-1) / jnp.log(CANDIDATES) > self.tau

        # The head is as large as a few layers; once every sample is done, it is not read again.
        unsure = jax.lax.cond(done.all(), lambda: jnp.zeros_like(done), judge)
        return stream.carry._replace(now=unsure & ~done, done=unsure | done)

    def mlp(self, stream, output):
        if not self.judged(stream.layer, stream.num_layers):
            return output
        visual, valid, now, _ = stream.carry
        plain, precise = output.astype(jnp.float32), jax.lax.Precision.HIGHEST

        def edited() -> Float[Array, "B T E"]:
            similar = jnp.einsum("BTE,BNE->BTN", stream.mlp_input, visual, precision=precise)
            looked_up = jnp.einsum("BTN,BNE->BTE", similar, visual, precision=precise).astype(jnp.float32)
            sizes = [jnp.where(valid, jnp.abs(part), 0).sum(axis=(1, 2), keepdims=True) for part in (plain, looked_up)]
            scaled = looked_up * (sizes[0] / jnp.where(sizes[1] > 0, sizes[1], 1))
            return jnp.where(now[:, None, None], (1 - self.rho) * plain + self.rho * scaled, plain)

        return jax.lax.cond(now.any(), edited, lambda: plain)

    @property
    def step_by_step(self) -> bool:
        return False

    def remember(self, carry, previous):
        return carry.visual

    def recall(self, previous):
        return dataclasses.replace(self, visual=previous)
