"""Scenes of the pocket world: the content of an image, and the image itself (96 x 96 RGB), from a seed."""

import dataclasses
import functools

import numpy as np
from PIL import Image

from lvlm_jax.errors import LVLMError
from lvlm_jax.pocket import catalogue
from lvlm_jax.pocket.catalogue import CATEGORIES, LABELS, SCENE_NAMES, SCENE_TYPES

SIZE = 96  # pixels along each side of an image
PATCH = 12  # pixels along each side of a patch of the vision tower
GRID = SIZE // PATCH
SPLITS = {"train": 0, "val": 1, "test": 2}

AGAINST_TYPE = 0.15  # share of test scenes whose objects belong to another place
MIN_VISIBLE = 0.4  # at least this share of every object's pixels stays visible
SOLID = 100  # alpha (0-255) from which a pixel belongs to the object


@dataclasses.dataclass(frozen=True)
class Placed:
    """One object of a scene.

    Attributes:
        category: COCO category name.
        colour: colour name, or None if the drawing has no single colour.
        sprite: index of the drawing in `catalogue.sprites()`.
        x, y: left and top of the drawing on the image, pixels; may be negative.
        size: longer side of the upright drawing, pixels.
        flip: whether the drawing is mirrored left to right.
        rotation: degrees, counter-clockwise.
        brightness: factor on the RGB values.
        box: (left, top, width, height) of the visible pixels.
        area: number of visible pixels.
        visible: visible pixels / pixels of the drawing.
    """

    category: str
    colour: str | None
    sprite: int
    x: int
    y: int
    size: int
    flip: bool
    rotation: int
    brightness: float
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    area: int = 0
    visible: float = 1.0

    @property
    def centre(self) -> tuple[float, float]:
        """Centre of the visible box, as fractions of the image's width and height."""
        left, top, width, height = self.box
        return (left + width / 2) / SIZE, (top + height / 2) / SIZE


@dataclasses.dataclass(frozen=True)
class Scene:
    """A scene: its background, and its objects from back to front.

    Attributes:
        kind: scene type as in `catalogue.SCENE_NAMES`; the background follows it.
        against_type: whether the objects were drawn from another scene type's distribution.
        horizon: row (pixels from the top) where the lower part of the background begins.
        upper, lower: RGB of the two parts.
        texture_seed: seed of the background's grain.
        objects: from back to front.
        owner: uint8 [96, 96], 1 + index of the object seen at a pixel, 0 for background.
    """

    kind: str
    against_type: bool
    horizon: int
    upper: tuple[int, int, int]
    lower: tuple[int, int, int]
    texture_seed: int
    objects: tuple[Placed, ...]
    owner: np.ndarray = dataclasses.field(compare=False, repr=False)

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """Category name -> number of visible objects, in order of first appearance."""
        counts: dict[str, int] = {}
        for placed in self.objects:
            counts[placed.category] = counts.get(placed.category, 0) + 1
        return counts

    def of(self, category: str) -> list[Placed]:
        """The objects of one category."""
        return [placed for placed in self.objects if placed.category == category]


# All sprites in all sizes, angles and mirror images are 11520 drawings, which take about 40 MB.
@functools.lru_cache(maxsize=16384)
def _drawing(sprite: int, size: int, flip: bool, rotation: int) -> np.ndarray:
    """RGBA uint8 [h, w, 4] of one transformed sprite, cropped to what is visible."""
    image = catalogue.sprite_image(sprite)
    scale = size / max(image.size)
    shape = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(shape, Image.Resampling.LANCZOS)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rotation:
        image = image.rotate(rotation, Image.Resampling.BICUBIC, expand=True)
    return np.asarray(image.crop(image.getchannel("A").getbbox()))


def _window(placed: Placed, height: int, width: int) -> tuple[slice, slice, slice, slice]:
    """The rows and columns of the image, and of the drawing, in which the two overlap."""
    top, left = max(0, placed.y), max(0, placed.x)
    bottom, right = min(SIZE, placed.y + height), min(SIZE, placed.x + width)
    rows, columns = slice(top, bottom), slice(left, right)
    return rows, columns, slice(top - placed.y, bottom - placed.y), slice(left - placed.x, right - placed.x)


def render(scene: Scene) -> np.ndarray:
    """The image of `scene`: uint8 [96, 96, 3]."""
    rows = np.arange(SIZE, dtype=np.float32)[:, None]
    shade = np.where(rows < scene.horizon, 1.1 - 0.2 * rows / SIZE, 0.82 + 0.25 * rows / SIZE)
    base = np.where(rows < scene.horizon, np.float32(scene.upper), np.float32(scene.lower)) * shade
    canvas = np.repeat(base[:, None, :].astype(np.float32), SIZE, axis=1)
    canvas += _texture(scene.texture_seed % 64, scene.horizon)[..., None]
    for placed in scene.objects:
        drawing = _drawing(placed.sprite, placed.size, placed.flip, placed.rotation)
        rows, columns, inner_rows, inner_columns = _window(placed, *drawing.shape[:2])
        drawing = drawing[inner_rows, inner_columns].astype(np.float32)
        alpha = drawing[..., 3:] / 255
        region = canvas[rows, columns]
        region += alpha * (np.minimum(drawing[..., :3] * placed.brightness, 255) - region)
    return np.clip(canvas, 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=1024)
def _texture(seed: int, horizon: int) -> np.ndarray:
    """Float32 [96, 96] grain: fine noise everywhere, coarse patches below the horizon."""
    rng = np.random.default_rng(seed)
    grain = rng.normal(0, 4, (SIZE, SIZE)).astype(np.float32)
    coarse = np.kron(rng.normal(0, 7, (SIZE // 8, SIZE // 4)), np.ones((8, 4))).astype(np.float32)
    grain[horizon:] += coarse[horizon:]
    return grain


def patch_labels(scene: Scene) -> np.ndarray:
    """Label of the object that covers most of each patch: int32 [64], row-major; 0 if none covers a fifth of it.

    Labels are those of `catalogue.LABELS` (1 + index in CATEGORIES); objects of one category count together.
    """
    lookup = np.zeros(256, np.int64)
    for i, placed in enumerate(scene.objects):
        lookup[i + 1] = LABELS[placed.category]
    labels = lookup[scene.owner].reshape(GRID, PATCH, GRID, PATCH).swapaxes(1, 2).reshape(GRID * GRID, PATCH * PATCH)
    width = len(CATEGORIES) + 1
    counts = np.bincount((labels + np.arange(GRID * GRID)[:, None] * width).ravel(), minlength=GRID * GRID * width)
    counts = counts.reshape(GRID * GRID, width)
    counts[:, 0] = PATCH * PATCH // 5
    return counts.argmax(axis=1).astype(np.int32)


def generator(split: str, index: int, seed: int = 0) -> np.random.Generator:
    """The random generator of scene `index` of a split; the same three values always give the same scene."""
    if split not in SPLITS:
        raise LVLMError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
    return np.random.default_rng([SPLITS[split], seed, index])


def scene_at(split: str, index: int, seed: int = 0) -> Scene:
    """Scene number `index` of a split."""
    return sample_scene(generator(split, index, seed), split)


def sample_scene(rng: np.random.Generator, split: str, kind_name: str | None = None) -> Scene:
    """Draws a scene, of the type `kind_name` if given.

    Train and validation scenes follow the scene types; a share of the test split does not.
    """
    place = int(rng.integers(len(SCENE_TYPES)))
    kind = SCENE_TYPES[place if kind_name is None else SCENE_NAMES.index(kind_name)]
    against = split == "test" and rng.random() < AGAINST_TYPE
    source = kind
    if against:
        others = [other for other in SCENE_TYPES if other is not kind]
        source = others[rng.integers(len(others))]
    tint = rng.integers(-14, 15, 6)
    upper = tuple(int(v) for v in np.clip(np.add(kind.upper, tint[:3]), 0, 255))
    lower = tuple(int(v) for v in np.clip(np.add(kind.lower, tint[3:]), 0, 255))
    horizon = int(rng.integers(28, 60))
    texture_seed = int(rng.integers(64))
    objects, owner = _place(rng, _choose(rng, source.name))
    return Scene(kind.name, bool(against), horizon, upper, lower, texture_seed, objects, owner)


def _choose(rng: np.random.Generator, source: str) -> list[str]:
    """Category names of 1 to 7 objects: mostly typical ones and their companions, some from anywhere, some twice."""
    count = 1 + int(rng.binomial(6, 0.46))
    names, weights = catalogue.typical_weights(source)
    cumulative = weights.cumsum()
    chosen: list[str] = []
    while len(chosen) < count:
        if chosen and rng.random() < 0.2:
            category = chosen[rng.integers(len(chosen))]
        elif rng.random() < 0.17:
            category = CATEGORIES[rng.integers(len(CATEGORIES))]
        else:
            category = names[min(int(cumulative.searchsorted(rng.random())), len(names) - 1)]
            if category in chosen:
                continue
        chosen.append(category)
        companion, chance = catalogue.COMPANIONS.get(category, ("", 0.0))
        if len(chosen) < count and companion not in chosen and rng.random() < chance:
            chosen.append(companion)
    return chosen


def _place(rng: np.random.Generator, chosen: list[str]) -> tuple[tuple[Placed, ...], np.ndarray]:
    """Finds a place for each object so that all stay visible; an object without a place is left out."""
    owner = np.zeros((SIZE, SIZE), np.uint8)
    placed_objects: list[Placed] = []
    totals: list[int] = []
    for category in chosen:
        for _ in range(12):
            placed = _throw(rng, category, len(chosen))
            solid = _drawing(placed.sprite, placed.size, placed.flip, placed.rotation)[..., 3] >= SOLID
            rows, columns, inner_rows, inner_columns = _window(placed, *solid.shape)
            mask = solid[inner_rows, inner_columns]
            total = int(solid.sum())
            if mask.sum() < 0.75 * total:
                continue
            trial = owner.copy()
            trial[rows, columns][mask] = len(placed_objects) + 1
            visible_pixels = np.bincount(trial.ravel(), minlength=len(placed_objects) + 2)[1:]
            if np.all(visible_pixels >= MIN_VISIBLE * np.array([*totals, total])):
                owner = trial
                placed_objects.append(placed)
                totals.append(total)
                break
    return tuple(_measure(p, owner == i + 1, totals[i]) for i, p in enumerate(placed_objects)), owner


def _throw(rng: np.random.Generator, category: str, crowd: int) -> Placed:
    """One attempt: a drawing of `category` with random size, pose and place; crowded scenes have smaller objects."""
    drawings = catalogue.sprites_of(category)
    sprite = drawings[rng.integers(len(drawings))]
    if rng.random() < 0.18:
        size = int(rng.integers(3, 5)) * 4
    else:
        size = int(rng.integers(5, 12 - min(crowd, 7) // 2)) * 4
    rotation = int(rng.integers(-2, 3)) * 10
    flip = bool(rng.random() < 0.5)
    brightness = round(float(rng.uniform(0.8, 1.15)), 2)
    height, width = _drawing(sprite, size, flip, rotation).shape[:2]
    x = int(rng.integers(-width // 8, SIZE - width + width // 8 + 1))
    lowest = SIZE - height + height // 8 + 1
    y = int(rng.integers(-height // 8, lowest))
    if category in catalogue.FLYING and rng.random() < 0.6:
        y = int(rng.integers(-height // 8, max(1, lowest // 2)))
    return Placed(category, catalogue.sprites()[sprite].colour, sprite, x, y, size, flip, rotation, brightness)


def _measure(placed: Placed, mask: np.ndarray, total: int) -> Placed:
    """`placed` with its box, area and visible fraction read from its visible pixels `mask` [96, 96]."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    box = (left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1)
    area = int(mask.sum())
    return dataclasses.replace(placed, box=box, area=area, visible=round(area / total, 3))
