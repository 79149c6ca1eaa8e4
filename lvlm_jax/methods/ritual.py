"""RITUAL: adds the logits of a randomly transformed image to those of the image. arXiv 2405.17821.

Each image of the second branch is changed by one of six transforms, drawn at random:

    flip        left and right
    flip_down   up and down
    rotate      about the middle by up to 180 degrees either way, nearest pixels, black outside
    colour      brightness, contrast and saturation times up to 2, hue by up to half a turn
    blur        Gaussian over 13 pixels, deviation 1.5 to 2
    crop        a part of 8 to 100 percent of the area, sides 3 : 4 to 4 : 3, at the size of the whole, bilinear

The draw of a sample's k-th image depends on `seed` and k alone. With l~ the second branch's logits:

    l + α l~      where l >= max l + ln β        α 3, β 0.1

Differs from the authors' code in: transforms act on the pixels that the tower receives (on each tile, if there are
tiles) and not on the file; values are assumed normalised as by CLIP's processor; colour changes have a fixed order; the
authors draw new transforms for every question.

Rows, layers, stages: none; the attention of both branches is plain. A sample without an image is left alone.
Cost: a second vision pass and a second prompt, and one more row through the weights per token.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from lvlm_jax.methods import transforms
from lvlm_jax.methods.base import Method, Readout, Strength, strength, switch
from lvlm_jax.methods.contrast import ImagePresence, where_image
from lvlm_jax.methods.cuts import plausible
from lvlm_jax.methods.registry import register


@register("ritual")
class RITUAL(Method):
    """Random image transformations as a universal helper; see the module for the formulas."""

    alpha: Strength = strength(3.0, "weight α of the transformed image's logits", low=0)
    beta: Strength = strength(0.1, "plausibility cut β", low=0, high=1, cuts=True)
    seed: Strength = strength(0, "seed of the transforms, a whole number", low=0, high=2**24, flat="a seed")
    only: str | None = switch(None, "one transform for all images", choices=(None, *transforms.ALL))

    PRESETS: ClassVar = {"default": dict(alpha=3.0, beta=0.1)}

    def branches(self):
        return (ImagePresence(), None)

    def contrast_prompt(self) -> str:
        return "altered"

    def contrast_image(self, picture, index):
        key = jax.random.fold_in(jax.random.key(jnp.asarray(self.seed).astype(jnp.uint32)), index)
        choice, parameters = jax.random.split(key)
        if self.only is not None:
            return transforms.ALL[self.only](parameters, picture)
        place = jax.random.randint(choice, (), 0, len(transforms.ALL))
        return jax.lax.switch(place, tuple(transforms.ALL.values()), parameters, picture)

    def combine(self, readout: Readout, memory):
        joined = readout.main + self.alpha * readout.contrast
        combined = plausible(joined, readout.main, self.beta)
        return where_image(readout.carry, combined, readout.main), memory
