"""Draws attention over the image: where a model looked during the whole answer, and for single words."""

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

# Words that name nothing visible; their maps say little.
_FUNCTION_WORDS = frozenset(
    "a an the this that these those there here it its is are was were be been being has have had do does did can of in "
    "on at to by for from with as into over under and or but not no yes also some any each other both image picture "
    "photo scene which who what while i you we they he she one".split()
)


@dataclasses.dataclass(frozen=True)
class ImageRow:
    """One answer about one image.

    Attributes:
        title: for example the method's name.
        image: the image, RGB.
        text: the answer.
        words: the answer's words, W of them.
        maps: attention of each word over the image's patches, `[W, h, w]`, averaged over layers and heads.
        region: the part of the image that the maps cover, `(left, top, right, bottom)` in pixels; None for all of it.
    """

    title: str
    image: Image.Image
    text: str
    words: Sequence[str]
    maps: Float[np.ndarray, "W h w"]
    region: tuple[float, float, float, float] | None = None


def rows_of(
    model, title: str, images: Sequence[Image.Image], messages: list[dict], tokens, method=None
) -> list[ImageRow]:
    """One row per image of a conversation: where `model` looked while it produced the answer `tokens`.

    `images` are those of `messages` in reading order; `method` is the one that produced the answer.
    """
    prompt = model.prepare(messages)
    places = token_places(model.config, prompt, len(images))
    weights = model.attention(prompt, [tokens], method)[0].mean((0, 2))
    decode = functools.partial(text.decode, model.processor.tokenizer)
    rows, fit = [], fitted(model, len(images))
    for image, maps in zip(images, patch_maps(weights, places), strict=True):
        words, joined = by_words(tokens, decode, maps.reshape(-1, *maps.shape[-2:]))
        rows.append(ImageRow(title, image, decode(tokens), words, joined, seen_region(*image.size, fit)))
    return rows


def by_words(
    tokens: Sequence[int], decode: Callable[[Sequence[int]], str], maps: Float[np.ndarray, "T h w"]
) -> tuple[list[str], Float[np.ndarray, "W h w"]]:
    """Averages the maps of the tokens of each word.

    `decode` turns token ids into text; see `analysis.words_of`.
    """
    _, words = words_of(tokens, decode)
    return [word.text for word in words], word_maps(maps, words)


def fitted(model, images: int) -> str:
    """How a processor fits an image into the view that the maps show: "stretch", "crop" or "pad".

    Args:
        model: an `LVLM`.
        images: number of images in the conversation.
    """
    if model.config.nested_images and images > 1:
        return "pad"
    crops = getattr(model.processor.image_processor, "do_center_crop", False)
    # For tiled images, that setting acts on views that already fit.
    return "crop" if crops and not model.config.tiled else "stretch"


def seen_region(width: int, height: int, fit: str) -> tuple[float, float, float, float] | None:
    """The part of an image that a map covers, `(left, top, right, bottom)` in pixels.

    This is the middle square if the image is cropped, the square around the image if it is padded, and None (the whole
    image) if it is stretched.
    """
    if fit == "stretch":
        return None
    side = min(width, height) if fit == "crop" else max(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def choose_words(row: ImageRow, count: int) -> list[int]:
    """Indices of up to `count` words whose maps differ most from the answer's mean map, in reading order."""
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
    """Each word's share of a patch's attention, relative to the mean of all words.

    Some patches draw much attention for every word; dividing by the mean leaves what is specific to the word. Each map
    is first scaled to sum to 1.
    """
    shares = maps / np.maximum(maps.sum((1, 2), keepdims=True), 1e-12)
    mean = shares.mean(0)
    return shares / np.maximum(mean, 1e-3 * mean.max() + 1e-12)


def draw(path, rows: Sequence[ImageRow], words: int = 5) -> None:
    """Writes a PNG: for each row the image, the attention of the whole answer, and that of up to `words` words.

    The whole answer's map is the mean over words. The single words' maps are relative to it (see `relative`). Every map
    has its own colour scale from its smallest to its largest value.

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


def panel(axis, row: ImageRow, heat, title: str) -> None:
    """Draws a row's image on a matplotlib axis, with the map `heat` over it if there is one."""
    width, height = row.image.size
    # Even a photograph of 50 megapixels is not drawn sharper than this size.
    small = row.image.copy()
    small.thumbnail((512, 512))
    extent = (0, width, height, 0)
    axis.imshow(np.asarray(small), extent=extent)
    if heat is not None:
        left, top, right, bottom = row.region or (0, 0, width, height)
        place = (left, right, bottom, top)
        axis.imshow(heat, extent=place, cmap="inferno", alpha=0.6, interpolation="bilinear")
    axis.set(xlim=extent[:2], ylim=extent[2:])
    axis.set_title(title, fontsize=9, parse_math=False)
