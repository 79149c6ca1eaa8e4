"""VHR: doubles the outputs of heads that depend on the image. arXiv 2412.13949, written from the paper's text.

A warm-up pass runs the prompt with and without its images in lock-step. With A_h the output of head h at the last
prompt row, before the output projection:

    VHD_h = |A_h(with images) - A_h(without)|²

VHD is set to 0 for outliers: heads for which both VHD_h and |A_h(without)|² exceed μ + σ of that quantity over the
layer's heads (population). Heads above the median of their layer are multiplied by α in all rows. Both passes apply
these edits layer by layer, so a layer's VHD includes the edits of earlier layers. The selected heads stay fixed for the
answer. α is 2; layer 1 and the last 14 of 32 (as a share of the depth).

Differs from the paper in: nothing known. The authors' code was not compared.

Rows: all. Stages: observe (warm-up), weights (a head's output is linear in them). A sample without an image is left
alone. Cost: the prompt twice more; explicit attention in the whole prompt and in one row a token.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lvlm_jax.attention import Context, Transform
from lvlm_jax.methods.base import Method, Strength, data, strength, switch
from lvlm_jax.methods.contrast import has_image
from lvlm_jax.methods.depth import layer_range
from lvlm_jax.methods.registry import register

LAST = 14 / 32  # share of the depth


@register("vhr")
class VHR(Method):
    """Vision-aware head reinforcement; see the module for the formulas."""

    alpha: Strength = strength(2.0, "factor α on the outputs of heads that depend on the image", low=0, per="head")
    layers: tuple[int, ...] | None = switch(None, "edited layers; by default layer 1 and the last 14 of 32")
    strong: jax.Array | None = data("which heads of every edited layer and sample are scaled; set by `after_warm_up`")

    PRESETS: ClassVar = {"llava-1.5": dict(alpha=2.0)}
    rows: ClassVar[str] = "all"
    by_rows: ClassVar[bool] = True
    warm_up_fields: ClassVar[tuple[str, ...]] = ("probe",)

    def edited(self, num_layers: int) -> tuple[int, ...]:
        """The layers whose heads are scaled; static."""
        layers = self.layers
        if layers is None:
            layers = (1, *range(num_layers - round(LAST * num_layers), num_layers))
        return layer_range(0, None, layers, num_layers)

    def active(self, layer, num_layers, phase):
        return self.strong is not None and layer in self.edited(num_layers)

    def probe(self):
        return Probe(self)

    def after_warm_up(self, warm_up) -> "VHR":
        return dataclasses.replace(self, strong=jnp.stack(warm_up.probe[1:]))

    def weights(self, site, weights):
        return self.scaled(weights, self.strong[self.edited(site.num_layers).index(site.layer)])

    def scaled(self, weights: Float[Array, "B H R S"], heads: Bool[Array, "B H"]) -> Float[Array, "B H R S"]:
        """Multiplies the weights of these heads by α."""
        return weights * jnp.where(heads[..., None, None], self.alpha, 1.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probe(Transform):
    """The warm-up pass: the first half of the samples have their images, the second half are the same without images.

    The carry says which samples have an image, and which heads of each edited layer are scaled.
    """

    method: VHR

    rows: ClassVar[str] = "all"

    def active(self, layer, num_layers, phase):
        return layer in self.method.edited(num_layers)

    def begin(self, context: Context, embeddings):
        return (has_image(context)[: embeddings.shape[0] // 2],)

    def observe(self, site, weights):
        values = site.read_values().astype(jnp.float32)
        row = weights[:, :, -1]
        grouped = row.reshape(row.shape[0], values.shape[1], -1, row.shape[2])
        outputs = jnp.einsum("BKGS,BKSD->BKGD", grouped, values, precision=jax.lax.Precision.HIGHEST)
        seeing, blind = jnp.split(outputs.reshape(*row.shape[:2], -1), 2)
        distance = ((seeing - blind) ** 2).sum(axis=-1)
        distance = jnp.where(outliers(distance) & outliers((blind**2).sum(axis=-1)), 0, distance)
        strong = distance > jnp.median(distance, axis=-1, keepdims=True)
        return (*site.carry, strong & site.carry[0][:, None])

    def weights(self, site, weights):
        return self.method.scaled(weights, jnp.concatenate([site.carry[-1]] * 2))


def outliers(values: Float[Array, "B H"]) -> Bool[Array, "B H"]:
    """Which values exceed the mean over heads by more than a standard deviation."""
    return values > values.mean(axis=-1, keepdims=True) + values.std(axis=-1, keepdims=True)
