"""How vision towers expect their pixels: values in [0, 1], minus a mean, divided by a standard deviation."""

from typing import NamedTuple


class Normalisation(NamedTuple):
    """Mean and standard deviation of the red, green and blue channels."""

    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]


CLIP = Normalisation((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
