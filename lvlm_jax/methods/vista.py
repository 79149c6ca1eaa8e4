"""VISTA: hidden states steered towards the image, and logits of layers below the top. arXiv 2502.03628.

Before a generation the prompt is run with and without its images. With h_l the residual stream behind layer l at the
last prompt token,

    v_l = h_l(with image) - h_l(without)

steers every row of the generation, prompt included, behind every layer l, keeping its norm:

    h <- |h| unit(unit(h) + λ unit(v_l))

The logits of early exits (hidden states 25 to 30 of 32, numbered as Hugging Face's `hidden_states`, through the
final norm and the head; as shares of the depth, so that other depths work) are added:

    mixing="add"      l + γ mean of the exits
    mixing="blend"    (1 - γ) l + γ mean of the exits

λ is 0.17, the authors' setting for LLaVA-1.5, and γ is 0.3. A sample without an image is left alone.

Rows: all. Layers: all. Stages: residual. Cost: the prompt three times (once without its image tokens), and the head
once more for every early exit.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lvlm_jax.attention import Context, Transform
from lvlm_jax.methods.base import Method, Readout, Strength, data, layer_range, strength, switch
from lvlm_jax.methods.contrast import ImagePresence, has_image, where_image
from lvlm_jax.methods.registry import register


@register("vista")
class VISTA(Method):
    """Visual information steering with token-logit augmentation; see the module for the formulas."""

    lambda_: Strength = strength(0.17, "steering strength λ")
    gamma: Strength = strength(0.3, "weight γ of the early exits", low=0)
    start_layer: int | float = switch(25 / 32, "first early exit")
    end_layer: int | float | None = switch(31 / 32, "the hidden state after the last early exit")
    layers: tuple[int, ...] | None = switch(None, "explicit hidden states, which overrule both")
    mixing: str = switch("add", "how early exits join the logits", choices=("add", "blend"))
    vectors: jax.Array | None = data("v of every layer and sample; `primed` sets it")

    PRESETS: ClassVar = {"llava-1.5": dict(lambda_=0.17, gamma=0.3)}
    primes: ClassVar[bool] = True

    def primed(self, with_image, without_image) -> "VISTA":
        difference = with_image[1:].astype(jnp.float32) - without_image[1:].astype(jnp.float32)
        return dataclasses.replace(self, vectors=difference)

    def branches(self):
        return (ImagePresence() if self.vectors is None else Steering(self.lambda_, self.vectors),)

    def exits(self, num_layers: int) -> tuple[int, ...]:
        return layer_range(self.start_layer, self.end_layer, self.layers, num_layers)

    def combine(self, readout: Readout, memory):
        kept = 1.0 if self.mixing == "add" else 1 - self.gamma
        augmented = kept * readout.main + self.gamma * readout.exits.mean(axis=0)
        return where_image(readout.carry, augmented, readout.main), memory


@dataclasses.dataclass(frozen=True)
class Steering(Transform):
    """Turns the residual stream towards a vector of its own for every layer and sample."""

    lambda_: Strength
    vectors: Float[Array, "L B E"]

    rows: ClassVar[str] = "last"

    def active(self, layer: int, num_layers: int, phase: str) -> bool:
        return False  # inside attention

    def begin(self, context: Context, embeddings):
        return has_image(context)

    def residual(self, layer, num_layers, phase, hidden):
        stream = hidden.astype(jnp.float32)
        turned = unit(stream) + self.lambda_ * unit(self.vectors[layer])[:, None]
        return (length(stream) * unit(turned)).astype(hidden.dtype)


def length(vector: Float[Array, "*S E"]) -> Float[Array, "*S 1"]:
    """The Euclidean length, with a gradient of zero at zero."""
    square = (vector**2).sum(axis=-1, keepdims=True)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def unit(vector: Float[Array, "*S E"]) -> Float[Array, "*S E"]:
    """The vector at length 1; zero for a zero vector, with a gradient of zero."""
    size = length(vector)
    return jnp.where(size > 0, vector / jnp.where(size > 0, size, 1), 0)
