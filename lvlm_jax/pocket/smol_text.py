"""Training text of `smol`: the pocket world's scenes in varied English, and turns without an image.

The world's own wordings (`captions`, `questions`) are few, which suits a model that learns English from them. A
language model that knows English would forget it, so everything here has many wordings.
"""

from collections.abc import Sequence

import numpy as np

from lvlm_jax.pocket import captions, catalogue, questions
from lvlm_jax.pocket.captions import capital, join, third
from lvlm_jax.pocket.scenes import Scene

Turn = tuple[str, str]

_OPENING = (
    "The image shows {kind}.",
    "This is a picture of {kind}.",
    "The picture was taken {where}.",
    "This photo shows {kind}.",
    "We are looking at {kind}.",
    "The scene is {kind}.",
    "In this image we see {kind}.",
)
_SIDES = {
    "left": ("On the left", "To the left", "At the left side", "On the left side of the image"),
    "middle": ("In the middle", "In the center", "Near the center of the image", "In the middle of the picture"),
    "right": ("On the right", "To the right", "At the right side", "On the right side of the image"),
}
_THERE = (
    "{side} there {verb} {what}.",
    "{side}, there {verb} {what}.",
    "{side} {verb} {what}.",
    "{side} I see {what}.",
)
_ALSO = (
    "There {verb} also {what}.",
    "{What} can be seen as well.",
    "I can also see {what}.",
    "Besides, there {verb} {what}.",
    "{What} {verb} there too.",
)
_SHORT = (
    "{Kind} with {what}.",
    "{What} {where}.",
    "There {verb} {what} in the image.",
    "The image shows {what} {where}.",
    "A picture of {kind} with {what}.",
)
DETAILED_PROMPTS = (
    "Please describe this image in detail.",
    "Describe this image in detail.",
    "Please help me describe the image in detail.",
    "Describe this image.",
    "What do you see in this picture?",
    "Tell me about this picture.",
    "What is going on in this image?",
)
SHORT_PROMPTS = (
    "Describe the image briefly.",
    "Write a short caption for this image.",
    "What is shown in this image?",
    "Give a one-sentence description of the picture.",
)
_EXISTENCE = (
    "Is there {a} in the image?",
    "Is there {a} in the picture?",
    "Is {a} in this image?",
    "Can you see {a}?",
    "Do you see {a} here?",
    "Does the image contain {a}?",
    "Does this picture show {a}?",
    "Is there {a}?",
)
_YES = ("Yes, there is {a} in the image.", "Yes, there is {a}.", "Yes, I can see {a}.", "Yes, the image shows {a}.")
_NO = (
    "No, there is no {name} in the image.",
    "No, there is no {name}.",
    "No, I cannot see {a}.",
    "No, I see no {name}.",
)
# Questions that no image of the world can answer.
_REFUSED = (
    ("What is the name of the person who took this photo?", "The image does not say who took it."),
    ("What time is it in the picture?", "I cannot tell the time from this image."),
    ("How much did these things cost?", "The image does not show what anything costs."),
    ("What are the people talking about?", "I cannot hear anything, so I do not know."),
    ("What year was this picture taken?", "I cannot tell the year from this image."),
    ("What happened before this picture was taken?", "The image does not show what happened before."),
    ("Whose house is this?", "I cannot tell whose it is from the image."),
    ("What is written on the back of the photo?", "I can only see the front of the image."),
)
_CAPITALS = {
    "Germany": "Berlin", "Spain": "Madrid", "Portugal": "Lisbon", "Greece": "Athens", "Norway": "Oslo",
    "Sweden": "Stockholm", "Poland": "Warsaw", "Austria": "Vienna", "Ireland": "Dublin", "Japan": "Tokyo",
    "China": "Beijing", "Egypt": "Cairo", "Kenya": "Nairobi", "Peru": "Lima", "Chile": "Santiago", "Cuba": "Havana",
    "Hungary": "Budapest", "Finland": "Helsinki", "Denmark": "Copenhagen", "Thailand": "Bangkok",
}  # fmt: skip
_FACTS = (
    ("How many days are in a week?", "There are seven days in a week."),
    ("How many months are in a year?", "There are twelve months in a year."),
    ("What is the opposite of cold?", "The opposite of cold is hot."),
    ("What is the opposite of big?", "The opposite of big is small."),
    ("What do bees make?", "Bees make honey."),
    ("What do cows eat?", "Cows eat grass."),
    ("Where do fish live?", "Fish live in water."),
    ("What does a clock show?", "A clock shows the time."),
    ("What do we use an umbrella for?", "We use an umbrella to keep dry in the rain."),
    ("Who wrote Romeo and Juliet?", "William Shakespeare wrote Romeo and Juliet."),
    ("What is the largest ocean on Earth?", "The largest ocean on Earth is the Pacific Ocean."),
    ("What is the largest planet in our solar system?", "Jupiter is the largest planet in our solar system."),
    ("What is ice made of?", "Ice is frozen water."),
    ("What is a baby dog called?", "A baby dog is called a puppy."),
    ("What is a baby cat called?", "A baby cat is called a kitten."),
    ("At what temperature does water boil?", "Water boils at 100 degrees Celsius at sea level."),
    ("What gas do people need to breathe?", "People need oxygen to breathe."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa."),
    ("What language is spoken in Brazil?", "Portuguese is spoken in Brazil."),
    ("Say hello.", "Hello! How can I help you today?"),
    ("Thank you.", "You're welcome! Let me know if there is anything else I can help you with."),
    ("Name three fruits.", "Three fruits are apples, bananas and oranges."),
    ("Name two animals that live on a farm.", "Cows and sheep live on a farm."),
    ("What is the first month of the year?", "The first month of the year is January."),
)


def pick(options: Sequence, rng: np.random.Generator):
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


def _verb(what: str) -> str:
    """ "is" or "are", according to the number of the first thing."""
    return "are" if what.split()[0].lower() in captions.NUMBERS[2:] else "is"


def _fill(pattern: str, what: str, **more: str) -> str:
    return pattern.format(what=what, What=capital(what), verb=_verb(what), **more)


def description(scene: Scene, rng: np.random.Generator, noisy: bool) -> str:
    """Two to five sentences that name every category of `scene`, by the position of its largest object.

    Args:
        noisy: also name one absent object that is typical of the place, as web captions do.
    """
    by_category = captions.phrases(scene)
    sides: dict[str, list[str]] = {side: [] for side in captions.THIRDS}
    afterthoughts = []
    for category, phrase in by_category.items():
        largest = max(scene.of(category), key=lambda placed: placed.area)
        sides[third(largest)].append(phrase)
    last = list(by_category.values())[-1]
    if len(by_category) > 2 and rng.random() < 0.4:
        afterthoughts.append(last)
        sides = {side: [phrase for phrase in group if phrase != last] for side, group in sides.items()}
    if noisy:
        absent = captions.quantity(captions.typical_absentee(scene, rng), 1)
        (afterthoughts if rng.random() < 0.6 else sides[pick(captions.THIRDS, rng)]).append(absent)
    sentences = [pick(_OPENING, rng).format(kind=scene.kind, where=catalogue.where(scene.kind))]
    for side, group in sides.items():
        if group:
            sentences.append(_fill(pick(_THERE, rng), join(group), side=pick(_SIDES[side], rng)))
    if afterthoughts:
        sentences.append(_fill(pick(_ALSO, rng), join(afterthoughts)))
    return " ".join(sentences)


def short_caption(scene: Scene, rng: np.random.Generator, noisy: bool) -> str:
    """One sentence that names up to three present categories; `noisy` as in `description`."""
    parts = list(captions.phrases(scene).values())[:3]
    if noisy:
        parts.insert(int(rng.integers(len(parts) + 1)), captions.quantity(captions.typical_absentee(scene, rng), 1))
    place_phrase, kind = catalogue.where(scene.kind), scene.kind
    return _fill(pick(_SHORT, rng), join(parts), where=place_phrase, kind=kind, Kind=capital(kind))


def caption_turn(scene: Scene, rng: np.random.Generator) -> Turn:
    """A request to describe the image and its answer, wrong as often as the world's training captions."""
    noisy = bool(rng.random() < captions.NOISE)
    if rng.random() < 0.7:
        return pick(DETAILED_PROMPTS, rng), description(scene, rng, noisy)
    return pick(SHORT_PROMPTS, rng), short_caption(scene, rng, noisy)


def existence_turn(scene: Scene, rng: np.random.Generator, hard: float | None) -> tuple[str, Turn]:
    """A question whether a category is in the image, with its answer; yes and no are equally likely.

    Args:
        hard: as in `absent_category`.

    Returns:
        The category, and the turn.
    """
    yes = bool(rng.random() < 0.5)
    name = pick(list(scene.counts), rng) if yes else questions.absent_category(scene, rng, hard)
    words = {"a": questions.article(name), "name": name}
    text = (_EXISTENCE[0] if rng.random() < 0.5 else pick(_EXISTENCE, rng)).format(**words)
    draw = rng.random()
    if draw < 0.3:
        return name, (text, pick(_YES if yes else _NO, rng).format(**words))
    suffix = " Please answer yes or no." if draw < 0.45 else ""
    return name, (text + suffix, "Yes" if yes else "No")


def refused_turn(rng: np.random.Generator) -> Turn:
    """A question that no image answers, and an answer that says so."""
    return pick(_REFUSED, rng)


def spoken_turns(count: int, rng: np.random.Generator) -> list[Turn]:
    """Turns without an image: facts, capitals and sums."""
    turns = []
    for _ in range(count):
        draw = rng.random()
        if draw < 0.3:
            country = pick(list(_CAPITALS), rng)
            turns.append((f"What is the capital of {country}?", f"The capital of {country} is {_CAPITALS[country]}."))
        elif draw < 0.45:
            a, b = (int(number) for number in rng.integers(1, 10, 2))
            turns.append((f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."))
        else:
            turns.append(pick(_FACTS, rng))
    return turns
