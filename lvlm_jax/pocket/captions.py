"""Captions of scenes: short, detailed, or a list of objects; some name an absent object, as web captions do."""

import numpy as np

from lvlm_jax.pocket import catalogue
from lvlm_jax.pocket.scenes import Placed, Scene

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven")
NOISE = 0.25  # share of training captions that mention an absent object
STYLES = ("with", "in", "there", "detailed", "sides")  # the five captions of an image, in this order
SHORT_STYLES = STYLES[:3]
THIRDS = ("left", "middle", "right")


def third(placed: Placed) -> str:
    """ "left", "middle" or "right": the third of the image with the centre of the object's box."""
    return THIRDS[min(2, int(placed.centre[0] * 3))]


def quantity(category: str, count: int, colour: str | None = None) -> str:
    """A number of objects in words: "a dog", "an apple", "some broccoli", "a pair of skis", "three red cars"."""
    if count == 1:
        return catalogue.with_article(category, colour)
    many = f"pairs of {category}" if category in catalogue.PAIRS else catalogue.plural(category)
    return f"{NUMBERS[count]} {colour} {many}" if colour else f"{NUMBERS[count]} {many}"


def join(parts: list[str]) -> str:
    """The parts in one list: "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def capital(text: str) -> str:
    """`text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def phrases(scene: Scene) -> dict[str, str]:
    """Category -> a phrase with the number of its objects, and their colour if it is the same; largest area first."""
    area: dict[str, int] = {}
    for placed in scene.objects:
        area[placed.category] = area.get(placed.category, 0) + placed.area
    by_category = {}
    for category in sorted(area, key=lambda name: -area[name]):
        objects = scene.of(category)
        colours = {placed.colour for placed in objects}
        by_category[category] = quantity(category, len(objects), colours.pop() if len(colours) == 1 else None)
    return by_category


def typical_absentee(scene: Scene, rng: np.random.Generator) -> str:
    """An absent object that would fit the scene: typical of the place, preferably a companion of present objects."""
    names, weights = catalogue.typical_weights(scene.kind)
    present = scene.counts
    invited = {catalogue.COMPANIONS[name][0] for name in present if name in catalogue.COMPANIONS}
    scores = np.array(
        [0.0 if n in present else w * (3 if n in invited else 1) for n, w in zip(names, weights, strict=True)]
    )
    if not scores.any():  # all typical objects are present
        absent = [name for name in catalogue.CATEGORIES if name not in present]
        return absent[rng.integers(len(absent))]
    return names[int((scores.cumsum() / scores.sum()).searchsorted(rng.random(), side="right"))]


def caption(scene: Scene, style: str, rng: np.random.Generator, noisy: bool = False) -> str:
    """One caption of `scene`.

    Args:
        style: "with", "in", "there" (one sentence with up to three categories), "list" (all categories), "detailed"
            (the place, then every category by its third of the image) or "sides" (the place and all categories, then
            the position of the largest object).
        noisy: also mention one absent object that is typical of the place.
    """
    by_category = phrases(scene)
    absent = typical_absentee(scene, rng) if noisy else None
    if style == "detailed":
        return _detailed(scene, by_category, absent, rng)
    parts = list(by_category.values())
    if style in SHORT_STYLES:
        parts = parts[:3]
    if absent is not None:
        parts.insert(int(rng.integers(len(parts) + 1)), quantity(absent, 1))
    if style == "with":
        return f"{capital(scene.kind)} with {join(parts)}."
    if style == "in":
        return f"{capital(join(parts))} {catalogue.where(scene.kind)}."
    if style == "there":
        return f"There {_verb(parts)} {join(parts)} in the image."
    if style == "list":
        return f"{capital(join(parts))}."
    if style == "sides":
        largest = max(scene.objects, key=lambda placed: placed.area)
        place = "in the middle" if third(largest) == "middle" else f"on the {third(largest)}"
        return f"A photo of {scene.kind} with {join(parts)}. The largest object is the {largest.category} {place}."
    raise ValueError(f"caption style {style!r} is unknown")


def _verb(parts: list[str]) -> str:
    """ "is" or "are", according to the number of the first part, as in spoken English."""
    return "are" if parts[0].split()[0] in NUMBERS else "is"


def _detailed(scene: Scene, by_category: dict[str, str], absent: str | None, rng: np.random.Generator) -> str:
    """A sentence for each third of the image, left to right; a last sentence ("There is also …") may name one more.

    A category is named in the third where its largest object is. Real descriptions often hallucinate at their end, so
    the last sentence names half of the absent objects.
    """
    groups: dict[str, list[str]] = {side: [] for side in THIRDS}
    afterthought = None
    names = list(by_category)
    if absent is not None and rng.random() < 0.5:
        afterthought = quantity(absent, 1)
    elif absent is not None:
        groups[THIRDS[rng.integers(3)]].append(quantity(absent, 1))
    elif len(names) > 2 and rng.random() < 0.6:
        afterthought = by_category[names.pop()]
    for category in names:
        largest = max(scene.of(category), key=lambda placed: placed.area)
        groups[third(largest)].append(by_category[category])
    sentences = [f"The image shows {scene.kind}."]
    for side, parts in groups.items():
        if parts:
            place = "In the middle" if side == "middle" else f"On the {side}"
            sentences.append(f"{place} there {_verb(parts)} {join(parts)}.")
    if afterthought is not None:
        sentences.append(f"There {_verb([afterthought])} also {afterthought}.")
    return " ".join(sentences)


def five_captions(scene: Scene, rng: np.random.Generator, noise: float = 0.0) -> list[tuple[str, bool]]:
    """The five captions of an image, one per style, each with a flag that is true if the caption is wrong.

    `noise` is the probability of a wrong caption.
    """
    result = []
    for style in STYLES:
        noisy = bool(rng.random() < noise)
        result.append((caption(scene, style, rng, noisy), noisy))
    return result
