"""Attention drawn over the image it lies on: where a model looked for the whole answer, and for single words."""

import dataclasses
import functools
import textwrap
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from lvlm_jax.analysis import canvas
from lvlm_jax.analysis.maps import patch_maps, token_places, word_maps
from lvlm_jax.analysis.words import words_of
from lvlm_jax.processors import text

# Words that name nothing one could see; maps of them say little.
_FUNCTION_WORDS = frozenset(
    "a an the this that these those there here it its is are was were be been being has have had do does did can of in "
    "on at to by for from with as into over under and or but not no yes also some any each other both image picture "
    "photo scene which who what while i you we they he she one".split()
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One answer about one image.

    Attributes:
        title: for example the method's name.
        image: the image, RGB.
        text: the answer.
        words: the answer's words, W of them.
        maps: attention of each word over the image's patches, `[W, h, w]`, averaged over layers and heads.
        region: what the maps cover, `(left, top, right, bottom)` in pixels; None for the whole image.
    """

    title: str
    image: Image.Image
    text: str
    words: Sequence[str]
    maps: Float[np.ndarray, "W h w"]
    region: tuple[float, float, float, float] | None = None


def rows_of(model, title: str, images: Sequence[Image.Image], messages: list[dict], tokens, method=None) -> list[Row]:
    """One row for each image of a conversation: where `model` looked while it produced the answer `tokens`.

    `images` are those of `messages` in reading order, `method` the one that the answer was produced with.
    """
    prompt = model.prepare(messages)
    places = token_places(model.config, prompt, len(images))
    weights = model.attention(prompt, [tokens], method)[0].mean((0, 2))
    decode = functools.partial(text.decode, model.processor.tokenizer)
    rows, fit = [], fitted(model, len(images))
    for image, maps in zip(images, patch_maps(weights, places), strict=True):
        words, joined = by_words(tokens, decode, maps.reshape(-1, *maps.shape[-2:]))
        rows.append(Row(title, image, decode(tokens), words, joined, seen_region(*image.size, fit)))
    return rows


def by_words(
    tokens: Sequence[int], decode: Callable[[Sequence[int]], str], maps: Float[np.ndarray, "T h w"]
) -> tuple[list[str], Float[np.ndarray, "W h w"]]:
    """Join the maps of the tokens of each word: their mean.

    `decode` turns token ids into text; see `analysis.words_of`.
    """
    _, words = words_of(tokens, decode)
    return [word.text for word in words], word_maps(maps, words)


def fitted(model, images: int) -> str:
    """How a processor fits a whole image into the view that maps are of: "stretch", "crop" or "pad".

    Args:
        model: an `LVLM`.
        images: how many its conversation has.
    """
    if model.config.nested_images and images > 1:
        return "pad"
    crops = getattr(model.processor.image_processor, "do_center_crop", False)
    # Where images are cut into tiles, that setting acts on views that fit already.
    return "crop" if crops and not model.config.tiled else "stretch"


def seen_region(width: int, height: int, fit: str) -> tuple[float, float, float, float] | None:
    """What a map covers, `(left, top, right, bottom)` in pixels: the middle square of an image that is cropped.

    The square around an image that is padded; None, which is all of it, for an image that is stretched.
    """
    if fit == "stretch":
        return None
    side = min(width, height) if fit == "crop" else max(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def choose_words(row: Row, count: int) -> list[int]:
    """Places of up to `count` words whose maps stand out most from the answer's mean map, in reading order."""
    if not len(row.words):
        return []
    contrast = relative(row.maps).max((1, 2))
    first = {}
    for index, word in enumerate(row.words):
        if len(word) > 2 and word.lower() not in _FUNCTION_WORDS:
            first.setdefault(word.lower(), index)
    ranked = sorted(first.values(), key=lambda index: -contrast[index])
    return sorted(ranked[:count])


def relative(maps: Float[np.ndarray, "W h w"]) -> Float[np.ndarray, "W h w"]:
    """Each word's share of a patch's attention against the mean of all words.

    Some patches draw much attention whatever is said; dividing by the mean leaves what belongs to the word. Each map is
    first scaled to sum to 1.
    """
    shares = maps / np.maximum(maps.sum((1, 2), keepdims=True), 1e-12)
    mean = shares.mean(0)
    return shares / np.maximum(mean, 1e-3 * mean.max() + 1e-12)


def draw(path, rows: Sequence[Row], words: int = 5) -> None:
    """Writes a PNG: for each row the image, the attention of the whole answer, and that of up to `words` words.

    The whole answer's map is the mean over words, the single words' maps are relative to it (see `relative`); every
    map has its own colour scale from its least to its greatest value.

    Raises:
        LVLMError: the file cannot be written.
    """
    columns = 2 + words
    heights = [2.1 * min(row.image.height / row.image.width, 1.5) + 0.9 for row in rows]
    figure = canvas.blank(2.1 * columns, sum(heights))
    parts = np.atleast_1d(figure.subfigures(len(rows), 1, height_ratios=heights))
    for part, row in zip(parts, rows, strict=True):
        caption = textwrap.shorten(f"{row.title}: {row.text}", 330, placeholder=" …")
        part.suptitle(textwrap.fill(caption, 24 * columns), x=0.01, ha="left", fontsize=9, parse_math=False)
        axes = part.subplots(1, columns)
        for axis in axes:
            axis.set_axis_off()
        panel(axes[0], row, None, "image")
        if not len(row.words):
            continue
        panel(axes[1], row, row.maps.mean(0), "all words")
        maps = relative(row.maps)
        for axis, index in zip(axes[2:], choose_words(row, words), strict=False):
            panel(axis, row, maps[index], row.words[index])
    canvas.save(figure, path)


def panel(axis, row: Row, heat, title: str) -> None:
    """Draws a row's image on a matplotlib axis, under a map if `heat` is one."""
    width, height = row.image.size
    # A photograph of 50 megapixels is not drawn sharper than one of this size.
    small = row.image.copy()
    small.thumbnail((512, 512))
    whole = (0, width, height, 0)
    axis.imshow(np.asarray(small), extent=whole)
    if heat is not None:
        left, top, right, bottom = row.region or (0, 0, width, height)
        place = (left, right, bottom, top)
        axis.imshow(heat, extent=place, cmap="inferno", alpha=0.6, interpolation="bilinear")
    axis.set(xlim=whole[:2], ylim=whole[2:])
    axis.set_title(title, fontsize=9, parse_math=False)
