"""Questions with checkable answers about one image or several, made from the content of a scene."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from lvlm_jax.pocket import catalogue
from lvlm_jax.pocket.captions import NUMBERS, capital, quantity, third, typical_absentee
from lvlm_jax.pocket.scenes import Placed, Scene

ORDINALS = ("first", "second", "third", "fourth")
OTHERS = 5  # largest number of wrong answers to "Which object is in all images?"
MARGIN = 0.1  # smallest difference between two positions in a question, as a fraction of the image's side
HARD_NEGATIVES = 0.25  # of the absent objects in training questions, the share that is typical of the scene

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
    """A question with its answer as a sentence (`full`) and as a single word (`short`, which is also the label).

    Attributes:
        wrong: the other answers that the question could have, (full, short) each; only some of them if there are many.
    """

    kind: str
    text: str
    full: str
    short: str
    wrong: tuple[tuple[str, str], ...] = ()


def article(category: str) -> str:
    """The category with "a" or "an" by its first letter, as in POPE's files (also "a skis")."""
    return ("an " if category[0] in "aeiou" else "a ") + category


def absent_category(scene: Scene, rng: np.random.Generator, hard: float | None = HARD_NEGATIVES) -> str:
    """A category that is not in `scene`.

    With probability `hard` it is typical of the place, else any; if `hard` is None, it is never typical.
    """
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
    """Half of the time the first wording, which is that of the benchmarks; else any of the wordings."""
    return options[0] if rng.random() < 0.5 else _pick(options, rng)


def _yes_no(kind: str, text: str, answer: bool, yes: str, no: str) -> Question:
    """A yes/no question with the statements that follow "Yes" and "No", one of which is true."""
    options = [(f"Yes, {yes}.", "Yes"), (f"No, {no}.", "No")]
    right, wrong = options if answer else options[::-1]
    return Question(kind, text, *right, (wrong,))


def _among(kind: str, text: str, right: tuple[str, str], options: Sequence[tuple[str, str]]) -> Question:
    """A question with one right answer of several."""
    return Question(kind, text, *right, tuple(option for option in options if option[1] != right[1]))


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
    right, other = ((f"{capital(article(name))}.", name) for name in (present, absent))
    return _among("choice", _paraphrase(CHOICE, rng).format(*pair), right, (right, other))


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

    def counted(number: int) -> tuple[str, str]:
        words = quantity(category, number) if number > 1 else f"one {category}" if number else f"no {many}"
        return f"There {'is' if number == 1 else 'are'} {words} in the image.", str(number)

    if rng.random() < 0.7:
        near = [counted(number) for number in (count - 1, count + 1) if 0 <= number < len(NUMBERS)]
        return _among("counting", _paraphrase(COUNT, rng).format(many), counted(count), near)
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
    other = number_asked if not answer else count + 1 if count + 1 < len(NUMBERS) else count - 1
    true, false = (
        f"there is one {category}" if number == 1 else f"there are {NUMBERS[number]} {many}"
        for number in (count, other)
    )
    return _yes_no("counting", text, answer, *((true, false) if answer else (false, true)))


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
        places = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
        options = {word: (f"The {name} is {place}.", word) for word, place in places.items()}
        return _among("position", f"Where is the {name} in the image?", options[third(first)], list(options.values()))
    axis = int(rng.integers(2))
    if abs(first.centre[axis] - 0.5) < MARGIN:
        return None
    sides = (("left", "right"), ("top", "bottom"))[axis]
    actual = sides[int(first.centre[axis] > 0.5)]
    side_asked = _pick(sides, rng)
    joint = "at the" if axis else "on the"
    side = "half" if axis else "side"
    statements = _sides(f"the {name} is {joint} {{}}", sides, side_asked)
    return _yes_no(
        "position", f"Is the {name} {joint} {side_asked} {side} of the image?", side_asked == actual, *statements
    )


def _sides(statement: str, sides: tuple[str, str], side: str) -> tuple[str, str]:
    """The statements that follow "Yes" and "No" in the answer to a question about one of two sides."""
    return statement.format(side), statement.format(sides[side == sides[0]])


def _relation(first: Placed, second: Placed, rng: np.random.Generator) -> Question:
    a, b = first.category, second.category
    actual = "left" if first.centre[0] < second.centre[0] else "right"
    side = _pick(("left", "right"), rng)
    if rng.random() < 0.4:
        options = [(f"The {name}.", name) for name in (a, b)]
        right = options[side != actual]
        return _among("position", f"Which is further to the {side}, the {a} or the {b}?", right, options)
    text = _pick((f"Is the {a} to the {side} of the {b}?", f"Is the {a} on the {side} side of the {b}?"), rng)
    statements = _sides(f"the {a} is to the {{}} of the {b}", ("left", "right"), side)
    return _yes_no("position", text, side == actual, *statements)


def colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Which colour does an object have? None if no object has a named colour."""
    coloured = [placed for placed in _single(scene) if placed.colour]
    if not coloured:
        return None
    placed = _pick(coloured, rng)
    name = placed.category
    if rng.random() < 0.5:
        options = {word: (f"The {name} is {word}.", word) for word in catalogue.COLOURS}
        return _among("color", f"What color is the {name}?", options[placed.colour], list(options.values()))
    answer = bool(rng.random() < 0.5)
    colour_asked = placed.colour if answer else _pick([c for c in catalogue.COLOURS if c != placed.colour], rng)
    other = next(word for word in catalogue.COLOURS if word != colour_asked) if answer else placed.colour
    statements = f"the {name} is {colour_asked}", f"the {name} is {other}"
    return _yes_no("color", f"Is there a {colour_asked} {name} in the image?", answer, *statements)


def place(scene: Scene, rng: np.random.Generator) -> Question:
    """A question about the kind of place."""
    options = {name: (f"{capital(name)}.", name.split(" ", 1)[1]) for name in catalogue.SCENE_NAMES}
    return _among("place", _paraphrase(PLACE, rng), options[scene.kind], list(options.values()))


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
    text = _pick(("Which image has {}?", "Which image shows {}?", "In which image is there {}?"), rng).format(
        article(name)
    )
    return _one_of_them("which_image", text, holders[name][0], len(scenes))


def _one_of_them(kind: str, text: str, place: int, count: int) -> Question:
    """A question whose answer is one of the images."""
    options = [(f"The {ordinal} image.", ordinal) for ordinal in ORDINALS[:count]]
    return _among(kind, text, options[place], options)


def in_all_images(scenes: Sequence[Scene], rng: np.random.Generator) -> Question:
    """Is a category in every image? If the images share a category, the answer is yes in most draws."""
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

    def option(number: int) -> tuple[str, str]:
        start = {0: "None of the images shows", 1: "One of the images shows"}.get(number)
        start = start or f"{NUMBERS[number].capitalize()} of the images show"
        return f"{start} {article(name)}.", str(number)

    options = [option(number) for number in range(len(scenes) + 1)]
    return _among("how_many_images", f"How many of the images show {article(name)}?", options[count], options)


def same_object(scenes: Sequence[Scene], rng: np.random.Generator) -> Question:
    """Do all images have some category in common?"""
    shared = _shared(scenes)
    images = _all_images(len(scenes))
    yes = f"{images} show {article((shared or list(scenes[0].counts))[0])}"
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


def which_lacks(scenes: Sequence[Scene], rng: np.random.Generator) -> Question | None:
    """Which image lacks the category that all others have?"""
    lacking: dict[str, list[int]] = {
        name: [i for i, scene in enumerate(scenes) if name not in scene.counts]
        for name in dict.fromkeys(name for scene in scenes for name in scene.counts)
    }
    names = [name for name, images in lacking.items() if len(images) == 1]
    if not names:
        return None
    name = _pick(names, rng)
    return _one_of_them("which_lacks", f"Which image has no {name}?", lacking[name][0], len(scenes))


def odd_one_out(scenes: Sequence[Scene], rng: np.random.Generator) -> Question | None:
    """Which of three or more images shows another place than the others, which all show one place?"""
    places = [scene.kind for scene in scenes]
    odd = [i for i, place in enumerate(places) if places.count(place) == 1]
    if len(scenes) < 3 or len(set(places)) != 2 or len(odd) != 1:
        return None
    text = _pick(("Which image is the odd one out?", "Which image shows another kind of place?"), rng)
    return _one_of_them("odd_one_out", text, odd[0], len(scenes))


def same_place(scenes: Sequence[Scene], rng: np.random.Generator) -> Question:
    """Do all images show one kind of place?"""
    images, places = _all_images(len(scenes)), list(dict.fromkeys(scene.kind for scene in scenes))
    yes, no = f"{images} show {places[0]}", f"{images} show different places"
    return _yes_no("same_place", f"Do {images} show the same kind of place?", len(places) == 1, yes, no)


def shared_object(scenes: Sequence[Scene], rng: np.random.Generator) -> Question | None:
    """Which category is in all images? None unless there is exactly one."""
    shared, images = _shared(scenes), _all_images(len(scenes))
    if len(shared) != 1:
        return None
    others = list(dict.fromkeys(name for scene in scenes for name in scene.counts if name != shared[0]))
    options = {name: (f"{capital(article(name))}.", name) for name in (*shared, *others[:OTHERS])}
    return _among("shared_object", f"Which object is in {images}?", options[shared[0]], list(options.values()))


SINGLE: dict[str, Callable] = {f.__name__: f for f in (existence, choice, counting, position, colour, place)}
MULTI: dict[str, Callable] = {
    f.__name__: f for f in (which_image, in_all_images, how_many_images, same_object, in_one_image)
}
# Only a comparison of the images can answer these; the shipped model's training has no such conversation.
COMPARISON: dict[str, Callable] = {f.__name__: f for f in (which_lacks, odd_one_out, same_place, shared_object)}
