"""VTI: turns feed-forward outputs along directions that were fitted on captions. arXiv 2410.15778.

With v_l a direction for each decoder layer and n(x) = x / |x|, in every layer, all rows and calls:

    x <- |x| n( n(x) + 0.1 λ n(v_l) )       x the feed-forward block's output, before it is added to the stream

`lvlm fit vti` computes v from 50 to 70 pairs of a good and a hallucinated caption of one image. With d the difference
of h_l at their last tokens, v_l = mean d + the unit first principal component of d, with the sign that makes the
largest score positive. λ is 0.8 to 0.9.

Differs from the authors' code in: the vision tower, which the authors steer too (α_image 0 to 0.9) and which stays
plain here.

Rows: all. Layers: all. Stage: mlp. A sample without an image is left alone. Cost: none worth measuring.
"""

from typing import ClassVar

import jax.numpy as jnp

from lvlm_jax.attention import Context
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods.base import Method, Strength, fitted, strength
from lvlm_jax.methods.contrast import has_image
from lvlm_jax.methods.fitted import Fitted
from lvlm_jax.methods.registry import register
from lvlm_jax.methods.vista import length, unit


@register("vti")
class VTI(Method):
    """Visual and textual intervention, its textual half; see the module for the formulas."""

    lambda_: Strength = strength(0.9, "steering strength λ", per="layer")
    fitted: Fitted | None = fitted("directions, a file of lvlm fit vti")

    PRESETS: ClassVar = {"llava-1.5": dict(lambda_=0.9)}
    rows: ClassVar[str] = "last"

    def begin(self, context: Context, embeddings):
        return has_image(context)

    def mlp(self, stream, output):
        directions = needed(self)["directions"]
        x, vector = output.astype(jnp.float32), directions[stream.layer]
        steered = length(x) * unit(unit(x) + 0.1 * self.lambda_ * unit(vector))
        return jnp.where(stream.carry[:, None, None], steered, x)


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
