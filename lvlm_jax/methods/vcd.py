"""VCD: contrast with the same prompt and noisy images. arXiv 2311.16922.

Images x of the contrast branch, as the vision tower receives them, are diffused for t steps (`noise_step`):

    x~ = sqrt(a_t) x + sqrt(1 - a_t) ε      a_t = Π_{i <= t} (1 - β_i)
    β = sigmoid(linspace(-6, 6, 1000)) (.005 - 1e-5) + 1e-5

so that `noise_step=500` is the product of the first 501 factors. The noise ε of a sample's k-th image depends only on
`seed` and k (if images are split into tiles, on the tile's number; if they are loose patches, also on the patch's
place). Then (1 + α) l - α l̃ where l >= max l + ln β.

Differs from the paper in: nothing known. Differs from the authors' code in: the authors draw new noise for every
question.

Rows, layers, stages: none; the attention of both branches is plain. A sample without an image is left alone.
Cost: a second vision pass and a second prompt, and one more row through the weights per token.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax.methods.base import Method, Readout, Strength, strength
from lvlm_jax.methods.contrast import ImagePresence, contrast_logits, where_image
from lvlm_jax.methods.registry import register

NOISE_STEPS = 1000


def _kept_variance() -> np.ndarray:
    """a_t for every t, `Float[np.ndarray, "1000"]`."""
    beta = (5e-3 - 1e-5) / (1 + np.exp(-np.linspace(-6, 6, NOISE_STEPS))) + 1e-5
    return np.cumprod(1 - beta)


@register("vcd")
class VCD(Method):
    """Visual contrastive decoding; see the module for the formulas."""

    alpha: Strength = strength(1.0, "contrast strength α", low=0)
    beta: Strength = strength(0.1, "plausibility cut β", low=0, high=1, cuts=True)
    noise_step: Strength = strength(
        500, "diffusion step of the noise, a whole number", low=0, high=999, flat="a whole number of steps"
    )
    seed: Strength = strength(0, "seed of the noise, a whole number", low=0, high=2**24, flat="a seed")

    PRESETS: ClassVar = {"default": dict(alpha=1.0, beta=0.1), "pope": dict(alpha=1.0, beta=0.2)}

    def branches(self):
        return (ImagePresence(), None)

    def contrast_prompt(self) -> str:
        return "pixels"

    def contrast_pixels(self, pixels, image_index):
        variance = jnp.asarray(_kept_variance(), jnp.float32)[jnp.asarray(self.noise_step).astype(jnp.int32)]
        key = jax.random.key(jnp.asarray(self.seed).astype(jnp.uint32))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, image_index)
        noise = jax.vmap(lambda one: jax.random.normal(one, pixels.shape[1:]))(keys)
        return jnp.sqrt(variance) * pixels + jnp.sqrt(1 - variance) * noise

    def combine(self, readout: Readout, memory):
        combined = contrast_logits(readout.main, readout.contrast, self.alpha, self.beta)
        return where_image(readout.carry, combined, readout.main), memory
