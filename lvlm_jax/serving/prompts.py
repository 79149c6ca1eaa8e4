"""From a conversation to a prompt in columns that few sizes of programs serve; runs in a pool of threads.

A prompt is cut behind its last image: the part before the cut is the same for all questions about the same images, so
its keys and values can be kept (`prefill`). Each part has a number of columns from a ladder; padding is on the left.
"""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from lvlm_jax.lvlm import LVLM
from lvlm_jax.processors import inputs, load
from lvlm_jax.processors.layout import PROMPT_BUCKET, Inputs
from lvlm_jax.serving.caches import digest

SMALLEST_REST = 32  # columns behind the images, in powers of four from here


def columns_before(tokens: int) -> int:
    """Columns for the part before the cut: 0, 64, 128, 192, 256, 384, 512, 768 and so on."""
    if tokens == 0:
        return 0
    step = PROMPT_BUCKET
    while tokens > 4 * step:
        step *= 2
    return -(-tokens // step) * step


def columns_behind(tokens: int) -> int:
    """Columns for the part behind the cut: 32, 128, 512 and so on."""
    columns = SMALLEST_REST
    while columns < tokens:
        columns *= 4
    return columns


@dataclasses.dataclass
class Prompt:
    """A prompt that is laid out.

    Attributes:
        given: as the processor and `layout` made it.
        laid_out: the same in `before + behind` columns.
        cut: tokens before the cut.
        before, behind: columns for the tokens before the cut, and for those behind it.
        images: one key for each image, or one for all where their tokens depend on each other; () without images.
        key: of everything before the cut.
        prefilled: what the prefill made of it, for further answers to the same request.
    """

    given: Inputs
    laid_out: Inputs
    cut: int
    before: int
    behind: int
    images: tuple[bytes, ...]
    key: bytes
    prefilled: Any = None

    @property
    def length(self) -> int:
        """Tokens."""
        return int(self.given.lengths[0])

    def parts(self) -> tuple[Inputs, np.ndarray]:
        """The part before the cut in `before` columns, and the token ids of the other in `behind` columns."""
        valid = self.given.image_id[0] >= 0
        tokens, image_id = (row[0][valid][None, : self.cut] for row in (self.given.tokens, self.given.image_id))
        first = dataclasses.replace(self.given, tokens=tokens, image_id=image_id)
        rest = self.given.tokens[0][valid][self.cut :]
        return first.padded(self.before, 0), np.pad(rest, (self.behind - len(rest), 0))[None]

    def places(self) -> np.ndarray:
        """Where in the columns of both `parts` each column of `laid_out` is found; anywhere for padding. `Int[T]`."""
        total, length = self.before + self.behind, self.length
        token = np.arange(total) - (total - length)
        first = self.before - self.cut + token
        return np.maximum(np.where(token < self.cut, first, total - length + token), 0).astype(np.int32)


class Prompts:
    """Lays out conversations in a pool of threads, each with a processor of its own: tokenizers are not shared."""

    def __init__(self, model: LVLM, workers: int, longest_rest: int):
        """Nothing is read yet.

        Args:
            longest_rest: tokens behind the cut for which programs are there from the start; a longer prompt without
                images is cut so that it finds them.
        """
        self._model, self._longest = model, columns_behind(longest_rest)
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(workers, "lvlm-prompts")

    def call(self, function: Callable[[], Any]) -> Future:
        """Calls a function in the pool."""
        return self._pool.submit(function)

    def close(self) -> None:
        """Ends the pool; what waits is not done."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def prepared(self, conversation: list[dict]) -> Prompt:
        """Lays out a conversation, whose images are PIL images; for threads of the pool.

        Raises:
            LVLMError: a conversation that the model cannot take.
        """
        model = self._model
        if not hasattr(self._own, "processor"):
            self._own.processor = load.load_processor(model.folder, model.config)
        return self.laid_out(inputs.from_messages(self._own.processor, model.config, conversation))

    def laid_out(self, given: Inputs) -> Prompt:
        """One prompt in columns of the ladder."""
        config, length = self._model.config, int(given.lengths[0])
        valid = given.image_id[0] >= 0
        image = np.flatnonzero(given.image_id[0][valid] > 0)
        cut = int(image[-1]) + 1 if len(image) else max(0, length - self._longest)
        before, behind = columns_before(cut), columns_behind(length - cut)
        laid_out = given.padded(before + behind, config.pad_token_id)
        words, images = given.tokens[0][valid][:cut], _keys(given, config)
        return Prompt(given, laid_out, cut, before, behind, images, digest([words, images]))


def _keys(given: Inputs, config: Any) -> tuple[bytes, ...]:
    if given.pixels is None:
        return ()
    if fixed(config, given):
        return tuple(digest([pixels]) for pixels in given.pixels)
    return (digest([given.pixels, given.owner, *given.geometry.items(), given.grids]),)


def fixed(config: Any, given: Inputs) -> bool:
    """Whether every image has tokens of its own, which depend on nothing else."""
    return (
        config.tokens_per_image is not None and not given.geometry and len(given.pixels) == int(given.owner.max()) + 1
    )
