"""Images of a benchmark: opened in threads ahead of the model, and encoded once for all questions about them.

If image tokens depend on more than the image (`FamilyConfig.tokens_per_image` is None), or on a method's edit of the
tower, images are only opened.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation.question import image_name
from lvlm_jax.processors.images import open_image
from lvlm_jax.processors.inputs import EncodedImage

READERS = 4  # threads that open the next images
REMEMBERED = 1 << 30  # bytes of images: 160 images that LLaVA-1.5-7B has encoded in bfloat16

Ready = EncodedImage | Image.Image


class Pictures:
    """The images of upcoming questions, in the order in which they will be needed.

    The tower takes them in groups of one size: neighbours in that order, whether or not some are already encoded. So
    there is one program, and a resumed run computes exactly what an uninterrupted one would. The most recent groups are
    cached; a benchmark whose images fit is encoded once.
    """

    def __init__(
        self, model: Any, needed: Iterable[Path | bytes], size: int, remembered: int = REMEMBERED, encode: bool = True
    ):
        """Opens nothing yet.

        Args:
            model: an `LVLM`.
            needed: every image in the order of its uses, with repeats.
            size: size of a group.
            remembered: bytes of images to cache; the newest group is always kept.
            encode: whether to encode images that can be encoded before their prompts.
        """
        order = list(dict.fromkeys(needed))
        size = max(1, min(size, len(order)))
        self._groups = [order[start : start + size] for start in range(0, len(order), size)]
        self._group_of = {picture: number for number, group in enumerate(self._groups) for picture in group}
        self._model, self._size, self._limit = model, size, remembered
        self._encode = encode and model.config.tokens_per_image is not None
        self._known: OrderedDict[int, dict[Path | bytes, Ready]] = OrderedDict()
        self._opening: dict[int, list[Future]] = {}
        self._pool = ThreadPoolExecutor(READERS)

    def __enter__(self) -> "Pictures":
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown(cancel_futures=True)

    def ready(self, pictures: Sequence[Path | bytes]) -> list[Ready]:
        """Some of the images, ready for messages.

        Raises:
            LVLMError: an image of the same group is unreadable.
        """
        return [self._group(self._group_of[picture])[picture] for picture in pictures]

    def _group(self, number: int) -> dict[Path | bytes, Ready]:
        if number not in self._known:
            opening = self._opening.pop(number, None) or self._open(number)
            images = [future.result() for future in opening]
            if number + 1 < len(self._groups) and number + 1 not in self._known:
                self._opening = {number + 1: self._open(number + 1)}
            if self._encode:
                spare = self._size - len(images)  # the last group is padded to the shape of the others
                images = self._model.encode_images(images + images[-1:] * spare)[: len(images)]
            self._known[number] = dict(zip(self._groups[number], images, strict=True))
        self._known.move_to_end(number)
        while len(self._known) > 1 and sum(map(_bytes, self._known.values())) > self._limit:
            self._known.popitem(last=False)
        return self._known[number]

    def _open(self, number: int) -> list[Future]:
        return [self._pool.submit(_opened, picture) for picture in self._groups[number]]


def _opened(picture: Path | bytes) -> Image.Image:
    try:
        return open_image(picture)
    except LVLMError as error:
        if not isinstance(picture, bytes):
            raise
        raise LVLMError(f"picture {image_name(picture)} of a table cannot be opened: {error}") from error


def _bytes(group: dict[Any, Ready]) -> int:
    return sum(
        image.pixels.nbytes + image.tokens.nbytes
        if isinstance(image, EncodedImage)
        else image.width * image.height * len(image.getbands())
        for image in group.values()
    )
