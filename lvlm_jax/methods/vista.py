"""VISTA: steers feed-forward outputs towards the image, and mixes in logits of inner layers. arXiv 2502.03628.

A warm-up pass runs the prompt with and without its images. With h_l the output of layer l at the last prompt token,

    v_l = h_l(with image) - h_l(without)

is the steering vector of layer l. With n(x) = x / |x|:

    variant="code" (the authors' program)
        the output x of every layer's feed-forward block, before it is added to the stream, in all rows:
            x <- |x| n(n(x) + λ (1 + max(0, cos(x, -v_l))) n(v_l))
        logits l:   (1 - γ) l + γ mean of the exits of hidden states 26 to 31 of 32, without the final norm
    variant="paper"
        the stream h after every layer, in all rows:
            h <- |h| n(h + λ v_l)
        logits l:   (1 - γ) l + γ mean of the exits of the five layers before the last, without the final norm

Hidden states are numbered as in Hugging Face's `hidden_states`: state i is the output of layer i - 1. Exit layers are
shares of the depth, so that other depths work. λ is 0.17 for descriptions, 0.01 for yes/no questions and 0.1 on
MMHal-Bench; γ is 0.3. A sample without an image is left alone.

Differs from the authors' code in: nothing known. Their code computes v by a principal component analysis of one sample,
which adds 1 to the first component of v in layer 0; so does "code". The paper does not say whether exits pass
the final norm; we assume that they do not.

Rows: all. Layers: all. Stages: mlp ("code"), residual ("paper"). Cost: the prompt twice more (once without its image
tokens), without logits, and the head once more for every exit.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lvlm_jax.attention import Context, Transform
from lvlm_jax.methods.base import Method, Readout, Strength, data, strength, switch
from lvlm_jax.methods.contrast import ImagePresence, has_image, where_image
from lvlm_jax.methods.depth import layer_range
from lvlm_jax.methods.registry import register

# First exit, by variant; the last exit is the hidden state before the final one.
FIRST_EXIT = {"code": 26 / 32, "paper": 27 / 32}


@register("vista")
class VISTA(Method):
    """Visual information steering with self-logits augmentation; see the module for the formulas."""

    lambda_: Strength = strength(0.17, "steering strength λ", per="layer")
    gamma: Strength = strength(0.3, "weight γ of the exits", low=0, high=1)
    start_layer: int | float | None = switch(
        None, "first exit, a hidden state; by default 26/32 of the depth, 27/32 under 'paper'"
    )
    end_layer: int | float | None = switch(None, "the hidden state after the last exit")
    layers: tuple[int, ...] | None = switch(None, "explicit hidden states, used instead")
    variant: str = switch("code", "formulas of the authors' code or of the paper", choices=("code", "paper"))
    vectors: jax.Array | None = data("v of every layer and sample; set by `after_warm_up`")

    PRESETS: ClassVar = {
        "llava-1.5/chair": dict(lambda_=0.17, gamma=0.3),
        "llava-1.5/pope": dict(lambda_=0.01, gamma=0.3),
        "llava-1.5/mmhal": dict(lambda_=0.1, gamma=0.3),
    }
    warm_up_fields: ClassVar[tuple[str, ...]] = ("hidden",)
    exit_norm: ClassVar[bool] = False

    def after_warm_up(self, warm_up) -> "VISTA":
        with_image, without_image = warm_up.hidden
        vectors = with_image[1:].astype(jnp.float32) - without_image[1:].astype(jnp.float32)
        if self.variant == "code":
            # Without an image both passes are equal, and the sample is left alone.
            differs = (vectors != 0).any(axis=(0, 2))
            vectors = vectors.at[0, :, 0].add(differs.astype(jnp.float32))
        return dataclasses.replace(self, vectors=vectors)

    def branches(self):
        if self.vectors is None:
            return (ImagePresence(),)
        return ({"code": MlpSteering, "paper": StreamSteering}[self.variant](self.lambda_, self.vectors),)

    def exits(self, num_layers: int) -> tuple[int, ...]:
        start = FIRST_EXIT[self.variant] if self.start_layer is None else self.start_layer
        return layer_range(start, self.end_layer, self.layers, num_layers)

    def combine(self, readout: Readout, memory):
        augmented = (1 - self.gamma) * readout.main + self.gamma * readout.exits.mean(axis=0)
        return where_image(readout.carry, augmented, readout.main), memory


@dataclasses.dataclass(frozen=True)
class Steering(Transform):
    """A steering vector for every layer and sample; samples without an image are left alone.

    The carry says which samples have an image.
    """

    lambda_: Strength
    vectors: Float[Array, "L B E"]

    rows: ClassVar[str] = "last"

    def active(self, layer: int, num_layers: int, phase: str) -> bool:
        return False  # no attention stages

    def begin(self, context: Context, embeddings):
        return has_image(context)


class MlpSteering(Steering):
    """Turns the output of the feed-forward block towards the image; the turn is larger if the output points away."""

    def mlp(self, stream, output):
        x, vector = output.astype(jnp.float32), self.vectors[stream.layer][:, None]
        away = jnp.maximum(0.0, -(unit(x) * unit(vector)).sum(axis=-1, keepdims=True))
        return length(x) * unit(unit(x) + self.lambda_ * (1 + away) * unit(vector))


class StreamSteering(Steering):
    """Adds the vector to the stream and keeps the stream's norm."""

    def residual(self, layer, num_layers, phase, hidden):
        stream = hidden.astype(jnp.float32)
        return length(stream) * unit(stream + self.lambda_ * self.vectors[layer][:, None])


def length(vector: Float[Array, "*S E"]) -> Float[Array, "*S 1"]:
    """The Euclidean length, with gradient zero at zero."""
    square = (vector**2).sum(axis=-1, keepdims=True)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def unit(vector: Float[Array, "*S E"]) -> Float[Array, "*S E"]:
    """The vector scaled to length 1; zero for a zero vector, with gradient zero."""
    size = length(vector)
    return jnp.where(size > 0, vector / jnp.where(size > 0, size, 1), 0)
