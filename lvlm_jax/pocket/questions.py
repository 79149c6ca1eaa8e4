"""Questions with checkable answers about one image or several, made from the content of a scene."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from lvlm_jax.pocket import catalogue
from lvlm_jax.pocket.captions import NUMBERS, quantity, third, typical_absentee
from lvlm_jax.pocket.scenes import Placed, Scene

ORDINALS = ("first", "second", "third", "fourth")
MARGIN = 0.1  # smallest difference between two positions in a question, as a fraction of the image's side
HARD_NEGATIVES = 0.25  # share of absent objects in training questions that are typical of the scene

EXISTENCE = (
    "Is there {} in the image?",
    "Is there {} in this image?",
    "Is there {} in the picture?",
    "Does the image contain {}?",
    "Can you see {} in the image?",
    "Do you see {} in the picture?",
    "Is there {}?",
    "Are there any {many} in the image?",
)
CHOICE = (
    "Which is in the image, {} or {}?",
    "Which of these is in the picture, {} or {}?",
    "What can you see in the image, {} or {}?",
)
COUNT = ("How many {} are in the image?", "How many {} are there in the picture?", "Count the {} in the image.")
PLACE = ("What place is shown in the image?", "Where was this picture taken?", "What kind of place is this?")


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its answer as a sentence (`full`) and as a single word (`short`, which is also the label)."""

    kind: str
    text: str
    full: str
    short: str


def article(category: str) -> str:
    """The category with "a" or "an" by its first letter, as in POPE's files (also "a skis")."""
    return ("an " if category[0] in "aeiou" else "a ") + category


def absent_category(scene: Scene, rng: np.random.Generator, hard: float | None = HARD_NEGATIVES) -> str:
    """A category not in `scene`: with probability `hard` typical of the place, else any; with None never typical."""
    if hard is not None and rng.random() < hard:
        return typical_absentee(scene, rng)
    ruled_out = set(scene.counts)
    if hard is None:
        ruled_out |= set(catalogue.typical_weights(scene.kind)[0])
    while True:
        category = catalogue.CATEGORIES[rng.integers(len(catalogue.CATEGORIES))]
        if category not in ruled_out:
            return category


def _pick(options: Sequence, rng: np.random.Generator):
    return options[int(rng.integers(len(options)))]


def _paraphrase(options: Sequence[str], rng: np.random.Generator) -> str:
    """The first wording (the benchmarks' own) half of the time, else any."""
    return options[0] if rng.random() < 0.5 else _pick(options, rng)


def _yes_no(kind: str, text: str, answer: bool, yes: str, no: str) -> Question:
    return Question(kind, text, f"Yes, {yes}." if answer else f"No, {no}.", "Yes" if answer else "No")


def existence(scene: Scene, rng: np.random.Generator, hard: float | None = HARD_NEGATIVES) -> Question:
    """Is a category there? Yes and no with equal chance; `hard` as in `absent_category`."""
    answer = bool(rng.random() < 0.5)
    category = _pick(list(scene.counts), rng) if answer else absent_category(scene, rng, hard)
    name = article(category)
    text = _paraphrase(EXISTENCE, rng).format(name, many=catalogue.plural(category))
    return _yes_no("existence", text, answer, f"there is {name} in the image", f"there is no {category} in the image")


def choice(scene: Scene, rng: np.random.Generator, hard: float | None = HARD_NEGATIVES) -> Question:
    """Which of two categories is there? One is, one is not; `hard` as in `absent_category`."""
    present, absent = _pick(list(scene.counts), rng), absent_category(scene, rng, hard)
    pair = [article(present), article(absent)]
    if rng.random() < 0.5:
        pair.reverse()
    name = article(present)
    return Question("choice", _paraphrase(CHOICE, rng).format(*pair), f"{name[0].upper()}{name[1:]}.", present)


def counting(scene: Scene, rng: np.random.Generator) -> Question | None:
    """How many objects of a category are there? Repeated objects are more likely, absent ones possible.

    None if the drawn category has no countable name ("two broccoli").
    """
    counts = scene.counts
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated and rng.random() < 0.6:
        category = _pick(repeated, rng)
    elif rng.random() < 0.15:
        category = absent_category(scene, rng)
    else:
        category = _pick(list(counts), rng)
    if category in catalogue.UNCOUNTABLE:
        return None
    count = counts.get(category, 0)
    many = catalogue.plural(category)
    if rng.random() < 0.7:
        words = quantity(category, count) if count > 1 else f"one {category}" if count else f"no {many}"
        full = f"There {'is' if count == 1 else 'are'} {words} in the image."
        return Question("counting", _paraphrase(COUNT, rng).format(many), full, str(count))
    answer = bool(rng.random() < 0.5)
    number_asked = max(1, count)
    if not answer or count == 0:
        number_asked = max(1, count + int(_pick((-1, 1), rng)))
        answer = number_asked == count
    text = (
        f"Are there {NUMBERS[number_asked]} {many} in the image?"
        if number_asked > 1
        else f"Is there only one {category} in the image?"
    )
    statement = f"there is one {category}" if count == 1 else f"there are {NUMBERS[count]} {many}"
    return _yes_no("counting", text, answer, statement, statement)


def _single(scene: Scene) -> list[Placed]:
    """Objects whose category occurs once, so that "the dog" is unambiguous."""
    counts = scene.counts
    return [
        placed for placed in scene.objects if counts[placed.category] == 1 and placed.category not in catalogue.PAIRS
    ]


def position(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Where is an object, by itself or relative to another? None if no object is clearly placed."""
    single = _single(scene)
    if not single:
        return None
    first = _pick(single, rng)
    others = [p for p in single if p is not first and abs(p.centre[0] - first.centre[0]) > MARGIN]
    if others and rng.random() < 0.4:
        return _relation(first, _pick(others, rng), rng)
    name = first.category
    if rng.random() < 0.5:
        place = "in the middle" if third(first) == "middle" else f"on the {third(first)}"
        return Question("position", f"Where is the {name} in the image?", f"The {name} is {place}.", third(first))
    axis = int(rng.integers(2))
    if abs(first.centre[axis] - 0.5) < MARGIN:
        return None
    sides = (("left", "right"), ("top", "bottom"))[axis]
    actual = sides[int(first.centre[axis] > 0.5)]
    side_asked = _pick(sides, rng)
    statement = f"the {name} is at the {actual}" if axis else f"the {name} is on the {actual}"
    joint = "at the" if axis else "on the"
    side = "half" if axis else "side"
    return _yes_no(
        "position",
        f"Is the {name} {joint} {side_asked} {side} of the image?",
        side_asked == actual,
        statement,
        statement,
    )


def _relation(first: Placed, second: Placed, rng: np.random.Generator) -> Question:
    a, b = first.category, second.category
    actual = "left" if first.centre[0] < second.centre[0] else "right"
    side_asked = _pick(("left", "right"), rng)
    if rng.random() < 0.4:
        answer = a if side_asked == actual else b
        return Question(
            "position", f"Which is further to the {side_asked}, the {a} or the {b}?", f"The {answer}.", answer
        )
    text = _pick(
        (f"Is the {a} to the {side_asked} of the {b}?", f"Is the {a} on the {side_asked} side of the {b}?"), rng
    )
    statement = f"the {a} is to the {actual} of the {b}"
    return _yes_no("position", text, side_asked == actual, statement, statement)


def colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Which colour has an object? None if no object has a named colour."""
    coloured = [placed for placed in _single(scene) if placed.colour]
    if not coloured:
        return None
    placed = _pick(coloured, rng)
    name = placed.category
    if rng.random() < 0.5:
        return Question("color", f"What color is the {name}?", f"The {name} is {placed.colour}.", placed.colour)
    answer = bool(rng.random() < 0.5)
    colour_asked = placed.colour if answer else _pick([c for c in catalogue.COLOURS if c != placed.colour], rng)
    statement = f"the {name} is {placed.colour}"
    return _yes_no("color", f"Is there a {colour_asked} {name} in the image?", answer, statement, statement)


def place(scene: Scene, rng: np.random.Generator) -> Question:
    """A question about the kind of place."""
    return Question(
        "place", _paraphrase(PLACE, rng), f"{scene.kind[0].upper()}{scene.kind[1:]}.", scene.kind.split(" ", 1)[1]
    )


def _all_images(count: int) -> str:
    return "both images" if count == 2 else f"all {NUMBERS[count]} images"


def _shared(scenes: Sequence[Scene]) -> list[str]:
    return [name for name in scenes[0].counts if all(name in scene.counts for scene in scenes[1:])]


def _any_category(scenes: Sequence[Scene], rng: np.random.Generator) -> str:
    return _pick(list(_pick(scenes, rng).counts), rng)


def which_image(scenes: Sequence[Scene], rng: np.random.Generator) -> Question | None:
    """Which image has the category that exactly one of them has?"""
    holders: dict[str, list[int]] = {}
    for i, scene in enumerate(scenes):
        for name in scene.counts:
            holders.setdefault(name, []).append(i)
    unique = [name for name, images in holders.items() if len(images) == 1]
    if not unique:
        return None
    name = _pick(unique, rng)
    ordinal = ORDINALS[holders[name][0]]
    text = _pick(("Which image has {}?", "Which image shows {}?", "In which image is there {}?"), rng).format(
        article(name)
    )
    return Question("which_image", text, f"The {ordinal} image.", ordinal)


def in_all_images(scenes: Sequence[Scene], rng: np.random.Generator) -> Question:
    """Is a category in every image? Yes with probability one half if the images share a category."""
    shared = _shared(scenes)
    answer = bool(shared) and bool(rng.random() < 0.6)
    if answer:
        name = _pick(shared, rng)
    else:
        name = _any_category(scenes, rng)
        answer = name in shared
    words, images = article(name), _all_images(len(scenes))
    text = f"Is there {words} in {images}?"
    return _yes_no("in_all_images", text, answer, f"there is {words} in {images}", f"there is not {words} in {images}")


def how_many_images(scenes: Sequence[Scene], rng: np.random.Generator) -> Question:
    """How many of the images show a category?"""
    name = absent_category(scenes[0], rng) if rng.random() < 0.15 else _any_category(scenes, rng)
    count = sum(name in scene.counts for scene in scenes)
    start = {0: "None of the images shows", 1: "One of the images shows"}.get(count)
    start = start or f"{NUMBERS[count].capitalize()} of the images show"
    return Question(
        "how_many_images", f"How many of the images show {article(name)}?", f"{start} {article(name)}.", str(count)
    )


def same_object(scenes: Sequence[Scene], rng: np.random.Generator) -> Question:
    """Do all images have some category in common?"""
    shared = _shared(scenes)
    images = _all_images(len(scenes))
    yes = f"{images} show {article(shared[0])}" if shared else ""
    return _yes_no(
        "same_object", f"Is the same object in {images}?", bool(shared), yes, f"{images} show different objects"
    )


def in_one_image(scenes: Sequence[Scene], rng: np.random.Generator) -> Question:
    """Is a category in a given image? Often the category is in another image."""
    i = int(rng.integers(len(scenes)))
    answer = bool(rng.random() < 0.5)
    if answer:
        name = _pick(list(scenes[i].counts), rng)
    else:
        name = _any_category(scenes, rng)
        if name in scenes[i].counts:
            name = absent_category(scenes[i], rng)
    words, where = article(name), f"in the {ORDINALS[i]} image"
    return _yes_no(
        "in_one_image", f"Is there {words} {where}?", answer, f"there is {words} {where}", f"there is no {name} {where}"
    )


SINGLE: dict[str, Callable] = {f.__name__: f for f in (existence, choice, counting, position, colour, place)}
MULTI: dict[str, Callable] = {
    f.__name__: f for f in (which_image, in_all_images, how_many_images, same_object, in_one_image)
}
