"""VTI: turns feed-forward outputs along directions that were fitted on captions and images. arXiv 2410.15778.

With v_l a direction for each layer and n(x) = x / |x|, in every layer of the decoder and of the vision tower, where
`lambda_image` replaces λ, in all rows and calls:

    x <- |x| n( n(x) + 0.1 λ n(v_l) )       x the feed-forward block's output, before it is added to the stream

`lvlm fit vti` computes v from 50 to 70 pairs of a good and a hallucinated caption of one image. With h_l the output of
layer l: in the decoder, d is the difference of h_l between the last tokens of the two captions. In the tower, d is the
mean of h_l over 50 copies of the image, each with 99 % of its patches masked, minus h_l of the image, averaged over
patches. v_l = mean d + the unit first principal component of d, with the sign that makes the largest score positive. λ
is 0.8 to 0.9 in the decoder, 0 to 0.9 in the tower.

`lambda_image` is 0 by default, which leaves the tower plain to the bit: files of older versions have no directions for
the tower, and with another value they are refused. It cannot be learned by `lvlm train`, which runs the tower once,
before training; `forward.encode_images` has its gradient.

Differs from the authors' code in: theirs has directions for each patch of the tower, which needs images of one size.

Rows: all. Layers: all. Stage: mlp. A sample without an image is left alone. Cost: none worth measuring.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lvlm_jax.attention import Context
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods.base import Method, Strength, fitted, strength
from lvlm_jax.methods.contrast import has_image
from lvlm_jax.methods.fitted import Fitted
from lvlm_jax.methods.registry import register
from lvlm_jax.methods.tower import TowerEdit
from lvlm_jax.methods.vista import length, unit


@register("vti")
class VTI(Method):
    """Visual and textual intervention; see the module for the formulas."""

    lambda_: Strength = strength(0.9, "steering strength λ", per="layer")
    lambda_image: Strength = strength(
        0.0,
        "steering strength λ in the vision tower; 0 for a plain tower",
        flat="a strength of the vision tower, which runs before training,",
    )
    fitted: Fitted | None = fitted("directions, a file of lvlm fit vti")

    PRESETS: ClassVar = {"llava-1.5": dict(lambda_=0.9, lambda_image=0.9)}
    rows: ClassVar[str] = "last"

    def __post_init__(self):
        super().__post_init__()
        if self.fitted is not None:
            self.tower_edit()  # refuses a file without directions for the tower

    def begin(self, context: Context, embeddings):
        return has_image(context)

    def mlp(self, stream, output):
        x = output.astype(jnp.float32)
        turned = steered(x, self.lambda_, needed(self)["directions"][stream.layer])
        return jnp.where(stream.carry[:, None, None], turned, x)

    def tower_edit(self) -> "TowerSteering | None":
        if is_zero(self.lambda_image):
            return None
        directions = needed(self).arrays.get("vision_directions")
        if directions is None:
            raise LVLMError(
                "VTI: the fitted file has no directions for the vision tower; fit it again with lvlm fit vti, or set "
                "lambda_image to 0"
            )
        return TowerSteering(self.lambda_image, directions)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TowerSteering(TowerEdit):
    """VTI's edit of the vision tower, with a direction for each of its layers."""

    strength: Strength
    directions: Float[Array, "L W"]

    def mlp(self, layer, output):
        return steered(output.astype(jnp.float32), self.strength, self.directions[layer])


def steered(x: Float[Array, "*T E"], strength: Strength, direction: Float[Array, "E"]) -> Float[Array, "*T E"]:
    """x, turned towards a direction and as long as before."""
    return length(x) * unit(unit(x) + 0.1 * strength * unit(direction))


def is_zero(value: Any) -> bool:
    """Whether a strength is known to be 0."""
    unknown = isinstance(value, jax.core.Tracer | jax.ShapeDtypeStruct)
    return not unknown and getattr(value, "is_fully_addressable", True) and float(value) == 0


def needed(method: Method) -> Fitted:
    """The fitted arrays of a method.

    Raises:
        LVLMError: the method has none.
    """
    if method.fitted is None:
        word = type(method).__name__.lower()
        raise LVLMError(
            f"{type(method).__name__} needs a fitted file: lvlm fit {word} --pairs FILE --model M --out F, then "
            "--fitted F"
        )
    return method.fitted
