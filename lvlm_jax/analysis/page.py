"""One HTML file, without any reference to the outside: a person clicks a word and sees where the model looked."""

import base64
import dataclasses
import io
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from lvlm_jax import pages
from lvlm_jax.analysis.words import Word
from lvlm_jax.errors import LVLMError

# Before base64, which adds a third: 4.1 MB and 0.5 MB, so that a page stays below 5 MB.
MAP_BYTES = 3_100_000  # of all maps
PICTURE_BYTES = 380_000  # of all pictures
LONGEST_SIDE = 640  # pixels of a picture in the page
TEMPLATE = pathlib.Path(__file__).with_name("page.html")


@dataclasses.dataclass(frozen=True)
class Answer:
    """One column of the page.

    Attributes:
        name: for example "greedy", or the method's name.
        settings: the method's settings, in words.
        text: the answer.
        words: the W words of the answer.
        maps: for each image and word, the weights of each layer and head on the image's places, after all edits.
        mass: share of a row's weight on all image columns.
        sinks: `sink_density` of the prompt.
        flow: `Flow.text_share`.
        probe: `masking_probe`, a curve for each word.
        drift: `Drift.noise` and `Drift.anchor`, a curve for each word.
    """

    name: str
    settings: str
    text: str
    words: list[Word]
    maps: Sequence[Float[np.ndarray, "L H W h w"]]
    mass: Float[np.ndarray, "L H W"]
    sinks: Float[np.ndarray, "L H"]
    flow: Float[np.ndarray, "L+1"]
    probe: Float[np.ndarray, "W L"]
    drift: tuple[Float[np.ndarray, "W L"], Float[np.ndarray, "W L"]]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture and the region that its maps cover, `(left, top, right, bottom)` in pixels; None for all of it."""

    image: Image.Image
    region: tuple[float, float, float, float] | None = None


def build(title: str, question: str, pictures: Sequence[Picture], answers: Sequence[Answer]) -> str:
    """The page as a string.

    Raises:
        LVLMError: an answer has no words, or there are no answers.
    """
    if not answers or not all(answer.words for answer in answers):
        names = ", ".join(answer.name for answer in answers if not answer.words) or "nothing"
        raise LVLMError(f"{names} has no words to show; ask a question that is answered in words")
    layers, heads = answers[0].maps[0].shape[:2]
    grids = [maps.shape[3:] for maps in answers[0].maps]
    per_map = sum(len(answer.words) for answer in answers) * sum(height * width for height, width in grids)
    mass = sum(answer.mass.size for answer in answers)
    with_heads, band = plan(layers, heads, per_map, MAP_BYTES - mass)
    data = {
        "title": title,
        "question": question,
        "pictures": [_picture(picture, PICTURE_BYTES / len(pictures)) for picture in pictures],
        "grids": grids,
        "layers": layers,
        "heads": heads,
        "band": band,
        "groups": ["mean", "max", *map(str, range(heads))] if with_heads else ["mean"],
        "answers": [_answer(answer, with_heads, band) for answer in answers],
    }
    return pages.render(TEMPLATE, title, data)


def plan(layers: int, heads: int, per_map: int, budget: int) -> tuple[bool, int]:
    """Whether a page has maps of single heads, and how many neighbouring layers it averages, to stay in a budget.

    Args:
        layers, heads: numbers of layers and heads of the model.
        per_map: bytes of the maps of one layer and head, for all words of all answers.
        budget: bytes for all maps.
    """
    if layers * (heads + 2) * per_map <= budget:
        return True, 1
    band = 1
    while -(-layers // band) * per_map > budget and band < layers:
        band += 1
    return False, band


def share_of(size: tuple[int, int], region: tuple[float, float, float, float] | None) -> list[float]:
    """Left, top, width and height of a region of a picture, as shares of the picture; None is the whole picture."""
    width, height = size
    left, top, right, bottom = region or (0, 0, width, height)
    return [left / width, top / height, (right - left) / width, (bottom - top) / height]


def pack(maps: Float[np.ndarray, "*any cells"]) -> tuple[str, str]:
    """Maps as base64: one byte a cell, and a float32 scale for each map.

        value = scale · (byte / 255)²

    The square keeps small weights distinct from zero: steps are 0.8 % of the largest weight at the top and 0.002 % at
    the bottom.
    """
    maps = maps.astype(np.float32)
    scale = maps.max(-1)
    shares = maps / np.where(scale > 0, scale, 1.0)[..., None]
    return _base64(np.rint(255 * np.sqrt(shares)).astype(np.uint8)), _base64(scale.astype("<f4"))


def _answer(answer: Answer, with_heads: bool, band: int) -> dict:
    grouped = [_groups(maps, with_heads) for maps in answer.maps]
    groups = np.concatenate([maps.reshape(*maps.shape[:3], -1) for maps in grouped], axis=-1)
    starts = range(0, len(groups), band)
    banded = np.stack([groups[start : start + band].mean(0) for start in starts], axis=1)
    cells, scales = pack(banded)
    return {
        "name": answer.name,
        "settings": answer.settings,
        "text": answer.text,
        "words": [[word.text, word.start, word.end] for word in answer.words],
        "maps": cells,
        "scales": scales,
        "mass": _base64(_shares(answer.mass.transpose(2, 0, 1))),
        "sinks": _base64(_shares(answer.sinks)),
        "flow": _numbers(answer.flow),
        "probe": _numbers(answer.probe),
        "drift": [_numbers(curve) for curve in answer.drift],
    }


def _groups(maps: Float[np.ndarray, "L H W h w"], with_heads: bool) -> Float[np.ndarray, "L G W h w"]:
    """The mean over heads; if `with_heads`, also the maximum over heads and each single head."""
    mean = maps.mean(1, keepdims=True)
    return np.concatenate([mean, maps.max(1, keepdims=True), maps], axis=1) if with_heads else mean


def _shares(values: np.ndarray) -> np.ndarray:
    """Shares between 0 and 1 as bytes, finer at the lower end like `pack`."""
    return np.rint(255 * np.sqrt(np.clip(values, 0, 1))).astype(np.uint8)


def _numbers(values: np.ndarray) -> list:
    return np.round(np.nan_to_num(np.asarray(values, np.float64)), 4).tolist()


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def _picture(picture: Picture, budget: float) -> dict:
    small = picture.image.convert("RGB")
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    kind, file = _encoded(small, budget)
    return {
        "source": f"data:image/{kind};base64," + base64.b64encode(file).decode(),
        "size": [small.width, small.height],
        "region": share_of(picture.image.size, picture.region),
    }


def _encoded(image: Image.Image, budget: float) -> tuple[str, bytes]:
    """The format and the bytes of a picture: PNG for a small drawing, else the best JPEG within a budget of bytes."""
    attempts = [("png", {"optimize": True})] if max(image.size) <= 128 else []
    attempts += [("jpeg", {"quality": quality}) for quality in (85, 70, 50, 30)]
    for kind, options in attempts:
        file = io.BytesIO()
        image.save(file, kind, **options)
        if file.tell() <= budget:
            break
    return kind, file.getvalue()
