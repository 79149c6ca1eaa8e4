"""How vision towers expect their pixels: values from 0 to 1, less a mean, over a deviation, for red, green and blue."""

from typing import NamedTuple


class Normalisation(NamedTuple):
    """Of the three channels."""

    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]


CLIP = Normalisation((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
