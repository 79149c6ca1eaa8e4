"""The content of the pocket world: categories, sprites, and scene types with their object distributions."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent

# Those of COCO's 80 categories for which there is a sprite, in COCO's order and with COCO's ids.
COCO_IDS = {
    "person": 1, "bicycle": 2, "car": 3, "motorcycle": 4, "airplane": 5, "bus": 6, "train": 7, "truck": 8, "boat": 9,
    "traffic light": 10, "stop sign": 13, "bird": 16, "cat": 17, "dog": 18, "horse": 19, "sheep": 20, "cow": 21,
    "elephant": 22, "bear": 23, "zebra": 24, "giraffe": 25, "backpack": 27, "umbrella": 28, "handbag": 31, "tie": 32,
    "suitcase": 33, "frisbee": 34, "skis": 35, "sports ball": 37, "kite": 38, "skateboard": 41, "tennis racket": 43,
    "bottle": 44, "wine glass": 46, "cup": 47, "fork": 48, "knife": 49, "spoon": 50, "bowl": 51, "banana": 52,
    "apple": 53, "sandwich": 54, "orange": 55, "broccoli": 56, "carrot": 57, "hot dog": 58, "pizza": 59, "donut": 60,
    "cake": 61, "chair": 62, "couch": 63, "potted plant": 64, "bed": 65, "toilet": 70, "tv": 72, "laptop": 73,
    "mouse": 74, "keyboard": 76, "cell phone": 77, "book": 84, "clock": 85, "vase": 86, "scissors": 87,
    "teddy bear": 88, "toothbrush": 90,
}  # fmt: skip
CATEGORIES = tuple(COCO_IDS)
# Label of a category in dense arrays (patch labels, owner maps): 1 + its index in CATEGORIES; 0 is "none".
LABELS = {name: 1 + i for i, name in enumerate(CATEGORIES)}

COLOURS = ("red", "blue", "green", "yellow", "purple")
# Categories that may be in the air; they are mostly placed in the upper half.
FLYING = frozenset({"airplane", "bird", "kite", "frisbee"})
PLURALS = {
    "person": "people", "bus": "buses", "sheep": "sheep", "skis": "skis", "knife": "knives", "sandwich": "sandwiches",
    "couch": "couches", "mouse": "mice", "wine glass": "wine glasses", "toothbrush": "toothbrushes",
    "scissors": "scissors", "broccoli": "broccoli", "tv": "tvs",
}  # fmt: skip
# Categories that take no article; COCO's annotators write "a pair of skis".
PAIRS = frozenset({"skis", "scissors"})
UNCOUNTABLE = PAIRS | {"broccoli"}
# Places that do not take "in".
PREPOSITIONS = {"a farm": "on", "a party": "at", "a station": "at", "an airport": "at", "a market": "at"}

# If the first category is drawn, the second follows with this probability: the strongest co-occurrences of the world.
COMPANIONS = {
    "fork": ("knife", 0.6), "knife": ("fork", 0.5), "spoon": ("bowl", 0.5), "keyboard": ("mouse", 0.65),
    "laptop": ("cell phone", 0.3), "bed": ("teddy bear", 0.4), "couch": ("tv", 0.5), "pizza": ("wine glass", 0.4),
    "tennis racket": ("sports ball", 0.5), "skis": ("person", 0.6), "car": ("traffic light", 0.35),
    "horse": ("person", 0.35), "dog": ("frisbee", 0.3), "toothbrush": ("cup", 0.4), "cake": ("fork", 0.35),
    "suitcase": ("handbag", 0.4), "sheep": ("cow", 0.3), "zebra": ("giraffe", 0.5), "boat": ("bird", 0.35),
    "umbrella": ("person", 0.4), "vase": ("potted plant", 0.3), "book": ("clock", 0.25), "wine glass": ("bottle", 0.5),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SceneType:
    """One kind of place.

    Attributes:
        name: word used in captions, with its article ("a kitchen").
        upper, lower: base RGB colours above and below the horizon.
        objects: category names, most typical first; weights decrease along the list.
    """

    name: str
    upper: tuple[int, int, int]
    lower: tuple[int, int, int]
    objects: tuple[str, ...]


def _scene(name: str, upper: tuple[int, int, int], lower: tuple[int, int, int], objects: str) -> SceneType:
    return SceneType(name, upper, lower, tuple(word.strip() for word in objects.split(",")))


SCENE_TYPES = (
    _scene("a kitchen", (236, 222, 190), (176, 132, 92),
           "knife, bowl, fork, spoon, cup, bottle, banana, apple, carrot, broccoli, cat"),
    _scene("a restaurant", (150, 70, 60), (228, 214, 196),
           "wine glass, pizza, fork, knife, bottle, person, chair, sandwich, cake"),
    _scene("a street", (176, 190, 204), (108, 108, 114),
           "car, traffic light, person, bus, truck, bicycle, motorcycle, stop sign, dog"),
    _scene("a farm", (158, 208, 240), (122, 172, 74),
           "cow, sheep, horse, dog, bird, truck, person, cat"),
    _scene("a savanna", (246, 206, 138), (204, 168, 96),
           "elephant, zebra, giraffe, bird, bear, truck, person"),
    _scene("an office", (206, 214, 224), (132, 138, 150),
           "laptop, keyboard, mouse, cell phone, chair, tie, cup, book, clock, scissors"),
    _scene("a bedroom", (222, 204, 228), (164, 128, 148),
           "bed, teddy bear, book, clock, cell phone, laptop, cat, vase"),
    _scene("a living room", (226, 218, 160), (152, 106, 72),
           "couch, tv, potted plant, cat, book, vase, clock, chair, dog"),
    _scene("a bathroom", (196, 232, 232), (232, 238, 242),
           "toothbrush, toilet, cup, bottle, scissors, potted plant, cell phone"),
    _scene("a party", (244, 178, 200), (226, 132, 158),
           "cake, donut, person, cup, wine glass, teddy bear, hot dog, bottle, tie"),
    _scene("a market", (250, 226, 168), (214, 190, 148),
           "apple, orange, banana, carrot, broccoli, person, handbag, umbrella"),
    _scene("a harbour", (170, 212, 236), (52, 116, 170),
           "boat, bird, person, suitcase, umbrella, bicycle, backpack"),
    _scene("a park", (184, 222, 240), (98, 190, 98),
           "dog, frisbee, kite, person, bicycle, sports ball, tennis racket, skateboard, bird"),
    _scene("a station", (190, 184, 178), (142, 128, 118),
           "train, suitcase, person, clock, backpack, handbag, bus, cell phone"),
    _scene("the snow", (188, 208, 238), (244, 248, 252),
           "skis, person, bear, backpack, bird, dog"),
    _scene("an airport", (206, 226, 250), (172, 176, 172),
           "airplane, suitcase, truck, person, bus, handbag, backpack, tie"),
)  # fmt: skip
SCENE_NAMES = tuple(kind.name for kind in SCENE_TYPES)


@dataclasses.dataclass(frozen=True)
class Sprite:
    """One drawing of a category: its colour name, if any, and its box in the sheet (left, top, width, height)."""

    category: str
    colour: str | None
    box: tuple[int, int, int, int]


@functools.cache
def sprites() -> tuple[Sprite, ...]:
    """All sprites of the sheet, in order; a scene refers to a sprite by its index here."""
    entries = json.loads((HERE / "sprites.json").read_text(encoding="utf-8"))
    return tuple(Sprite(entry["category"], entry["colour"], tuple(entry["box"])) for entry in entries)


@functools.cache
def sprites_of(category: str) -> tuple[int, ...]:
    """Indices in `sprites()` of the drawings of `category`."""
    return tuple(i for i, sprite in enumerate(sprites()) if sprite.category == category)


@functools.cache
def sprite_image(index: int) -> Image.Image:
    """RGBA image of sprite `index`; its longer side has 48 pixels."""
    left, top, width, height = sprites()[index].box
    return _sheet().crop((left, top, left + width, top + height))


@functools.cache
def _sheet() -> Image.Image:
    with Image.open(HERE / "sprites.png") as sheet:
        return sheet.convert("RGBA")


@functools.cache
def typical_weights(scene_type: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Object names of a scene type and their probabilities (falling with rank, summing to one)."""
    names = SCENE_TYPES[SCENE_NAMES.index(scene_type)].objects
    weights = 1.0 / np.sqrt(1.0 + np.arange(len(names)))
    return names, weights / weights.sum()


def where(scene_type: str) -> str:
    """A scene type with its preposition: "in a kitchen", "at a party"."""
    return f"{PREPOSITIONS.get(scene_type, 'in')} {scene_type}"


def plural(category: str) -> str:
    """Plural of a category name as captions write it."""
    return PLURALS.get(category, category + "s")


def with_article(category: str, colour: str | None = None) -> str:
    """`category` with its article as captions write it: "a dog", "a red apple", "a pair of skis", "some broccoli"."""
    if category in UNCOUNTABLE:
        return f"a pair of {category}" if category in PAIRS else f"some {category}"
    words = f"{colour} {category}" if colour else category
    return ("an " if words[0] in "aeiou" else "a ") + words
