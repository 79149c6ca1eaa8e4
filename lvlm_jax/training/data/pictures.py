"""Images of training rows: numbers of image tokens, known before images are opened, and the tower's inputs.

In every family, the size of an image determines its number of tokens. So sizes are read when training begins, and white
images of these sizes go through the checkpoint's processor, which writes the placeholder text of each. The images
themselves are opened when their batch is made, and processed as at inference.
"""

import copy
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from PIL import Image

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.models.pictures import Pictures
from lvlm_jax.processors import inputs
from lvlm_jax.processors.answer_tokens import Tokens
from lvlm_jax.processors.images import image_size, open_image

SEPARATOR = "\x1e"  # occurs in no text that a processor writes


@dataclasses.dataclass(frozen=True)
class Cropped:
    """A part of an image, enlarged to the size of the whole image.

    Attributes:
        image: the image.
        box: left, upper, right and lower edge of the part, as shares of the image's sides.
    """

    image: Path | bytes
    box: tuple[float, float, float, float]


Picture = Path | bytes | Cropped


def size_of(picture: Picture) -> tuple[int, int]:
    """Width and height in pixels, from the image's header. Raises `LVLMError` as `images.image_size`."""
    return image_size(picture.image if isinstance(picture, Cropped) else picture)


def opened_rgb(picture: Picture) -> Image.Image:
    """The image as upright 8-bit RGB. Raises `LVLMError` as `images.open_image`."""
    if not isinstance(picture, Cropped):
        return open_image(picture)
    full_image = open_image(picture.image)
    left, upper, right, lower = picture.box
    width, height = full_image.size
    edges = (int(left * width), int(upper * height), math.ceil(right * width), math.ceil(lower * height))
    return full_image.crop(edges).resize(full_image.size, Image.Resampling.BICUBIC)


class Runs(NamedTuple):
    """A sequence in which adjacent image tokens are merged into one.

    Attributes:
        ids, answers: as in `Tokens`.
        repeats: for each token of `ids`, the number of equal adjacent tokens that it stands for.
    """

    ids: Int[np.ndarray, " U"]
    answers: Bool[np.ndarray, " U"]
    repeats: Int[np.ndarray, " U"]

    @property
    def length(self) -> int:
        """Number of tokens of the sequence."""
        return int(self.repeats.sum())

    def tokens(self) -> Tokens:
        """The sequence with all image tokens."""
        return Tokens(np.repeat(self.ids, self.repeats), np.repeat(self.answers, self.repeats))


@dataclasses.dataclass(frozen=True)
class Placeholders:
    """The placeholders of a row's images.

    Attributes:
        marker: what the chat template writes for an image.
        texts: what the processor writes instead of each marker.
        counts: `Int[I]`, number of image tokens of each image.
    """

    marker: str
    texts: tuple[str, ...]
    counts: Int[np.ndarray, " I"]

    def expanded(self, text: str) -> str:
        """A text that the chat template wrote, with `texts` instead of the markers."""
        first, *rest = text.split(self.marker)
        return first + "".join(text_of_image + piece for text_of_image, piece in zip(self.texts, rest, strict=False))

    def laid_out(self, tokens: Tokens, config: FamilyConfig) -> Runs:
        """A sequence in the form that the model of `config` reads.

        Raises:
            LVLMError: the image tokens do not match the images.
        """
        # If the family adds placeholders, it counts images and puts the placeholders at the front.
        part = {"pixel_values": self.counts} if len(self.counts) else {}
        (ids,) = inputs.with_placeholders([tokens.ids], [part], config)
        answers = np.pad(tokens.answers, (len(ids) - len(tokens.ids), 0))
        placeholder = ids == config.image_token_id
        count = int(placeholder.sum())
        if count == len(self.counts):
            repeats = np.ones(len(ids), np.int32)
            repeats[placeholder] = self.counts
            return Runs(ids, answers, repeats)
        if count != self.counts.sum():
            raise LVLMError(
                f"it has {count} image tokens and its {len(self.counts)} images take {self.counts.sum()}; do not "
                "write the tokenizer's image token into a message's text"
            )
        begins = np.flatnonzero(~(placeholder & np.insert(placeholder[:-1], 0, False)))
        repeats = np.diff(begins, append=len(ids)).astype(np.int32)
        return Runs(ids[begins], answers[begins], repeats)


class _RecordingTokenizer:
    """A tokenizer that stores the last text it was given."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.text = ""

    def __call__(self, text: str | list[str], *arguments: Any, **options: Any) -> Any:
        self.text = text if isinstance(text, str) else text[0]
        return self.tokenizer(text, *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def placeholders(processor: Any, config: FamilyConfig, sizes: Sequence[tuple[int, int]]) -> Placeholders:
    """The placeholders of the images of one row.

    Args:
        processor: the checkpoint's transformers processor.
        config: the model's configuration.
        sizes: width and height of each image, in pixels.

    Raises:
        LVLMError: the family cannot read an image of one of these sizes.
    """
    marker, count = inputs.image_marker(processor), len(sizes)
    if not count or config.tokens_per_image is not None:
        text = getattr(processor, "full_image_sequence", marker)
        each = config.tokens_per_image if count else 0
        return Placeholders(marker, (text,) * count, np.full(count, each))
    listening = copy.copy(processor)
    listening.tokenizer = recorder = _RecordingTokenizer(processor.tokenizer)
    white = [Image.new("RGB", size, "white") for size in sizes]
    ids, part = inputs.run_processor(listening, config, SEPARATOR.join([marker] * count), white)
    prompts = inputs.with_placeholders([ids], [part], config)
    counts = config.pictures([part], prompts).token_counts
    return Placeholders(marker, tuple(recorder.text.split(SEPARATOR)), counts)


def arrays_of(pictures: Pictures, rows: int) -> dict[str, Any]:
    """`images` and, if the tower needs more, `geometry` of a batch, padded to `rows` rows of the tower."""

    def filled(array: np.ndarray) -> np.ndarray:
        array = array.astype(np.int32) if array.dtype.kind == "i" else array
        missing = rows - len(array) if len(array) == len(pictures.pixels) else 0
        return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))

    geometry = {name: filled(array) for name, array in pictures.geometry.items()}
    return {"images": filled(pictures.pixels)} | ({"geometry": geometry} if geometry else {})


def stacked(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Stacks arrays of the parts of a batch; smaller ones are padded with zeros.

    Raises:
        LVLMError: tiles have several sizes.
    """
    shape = np.max([array.shape for array in arrays], axis=0)
    # The blank image of a part without images has the smallest size.
    sides = {array.shape[-1] for array in arrays if array.ndim == 4 and array.any()}
    if len(sides) > 1:
        raise LVLMError(
            f"the tiles of a step's images have {', '.join(map(str, sides))} pixels a side; expected one size, or "
            "accumulate=1"
        )
    return np.stack([np.pad(array, [(0, n) for n in shape - array.shape]) for array in arrays])
