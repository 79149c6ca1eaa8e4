"""Lays out a conversation in one of few sizes, so that few programs are compiled; runs in a pool of threads.

A prompt is cut after its last image: the part before the cut is the same for all questions about the same images, so
its keys and values can be cached (`prefill`). Each part has a number of columns from a fixed series; padding is on the
left.
"""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from lvlm_jax.generation.prefixes import digest
from lvlm_jax.lvlm import LVLM
from lvlm_jax.processors import inputs, load
from lvlm_jax.processors.layout import PROMPT_BUCKET, Inputs

SMALLEST_REST = 32  # the fewest columns after the images; larger numbers are this times a power of four


def columns_before(tokens: int) -> int:
    """Number of columns for the part before the cut: 0, 64, 128, 192, 256, 384, 512, 768 and so on."""
    if tokens == 0:
        return 0
    step = PROMPT_BUCKET
    while tokens > 4 * step:
        step *= 2
    return -(-tokens // step) * step


def columns_behind(tokens: int) -> int:
    """Number of columns for the part after the cut: 32, 128, 512 and so on."""
    columns = SMALLEST_REST
    while columns < tokens:
        columns *= 4
    return columns


@dataclasses.dataclass
class Prompt:
    """A laid-out prompt.

    Attributes:
        inputs: the layout from the processor and `layout`.
        laid_out: the same layout in `before + behind` columns.
        cut: number of tokens before the cut.
        before, behind: number of columns for the tokens before the cut, and for those after it.
        images: one key per image, or one for all if their tokens depend on each other; () without images.
        key: key of everything before the cut.
        prefilled: result of the prefill, for further answers to the same request.
        work: the running prefill.
    """

    inputs: Inputs
    laid_out: Inputs
    cut: int
    before: int
    behind: int
    images: tuple[bytes, ...]
    key: bytes
    prefilled: Any = None
    work: Any = None

    @property
    def length(self) -> int:
        """Number of tokens."""
        return int(self.inputs.lengths[0])

    def parts(self) -> tuple[Inputs, np.ndarray]:
        """The part before the cut in `before` columns, and the token ids of the other part in `behind` columns."""
        valid = self.inputs.image_id[0] >= 0
        tokens, image_id = (row[0][valid][None, : self.cut] for row in (self.inputs.tokens, self.inputs.image_id))
        first = dataclasses.replace(self.inputs, tokens=tokens, image_id=image_id)
        rest = self.inputs.tokens[0][valid][self.cut :]
        return first.padded(self.before, 0), np.pad(rest, (self.behind - len(rest), 0))[None]

    def places(self) -> np.ndarray:
        """For each column of `laid_out`, its column in the concatenated `parts`; arbitrary for padding. `Int[T]`."""
        total, length = self.before + self.behind, self.length
        token = np.arange(total) - (total - length)
        first = self.before - self.cut + token
        return np.maximum(np.where(token < self.cut, first, total - length + token), 0).astype(np.int32)


class Prompts:
    """Lays out conversations in a pool of threads; each thread has its own processor, because tokenizers cannot be
    shared."""

    def __init__(self, model: LVLM, workers: int, longest_rest: int):
        """Loads nothing yet.

        Args:
            longest_rest: number of tokens after the cut for which programs exist from the start; longer prompts without
                images are cut to fit them.
        """
        self._model, self._longest = model, columns_behind(longest_rest)
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(workers, "lvlm-prompts")

    def call(self, function: Callable[[], Any]) -> Future:
        """Calls a function in the pool."""
        return self._pool.submit(function)

    def close(self) -> None:
        """Ends the pool; waiting tasks are dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def prepared(self, conversation: list[dict]) -> Prompt:
        """Lays out a conversation with PIL images; for threads of the pool.

        Raises:
            LVLMError: the model cannot process the conversation.
        """
        model = self._model
        if not hasattr(self._own, "processor"):
            self._own.processor = load.load_processor(model.folder, model.config)
        return self.laid_out(inputs.from_messages(self._own.processor, model.config, conversation))

    def laid_out(self, prompt: Inputs) -> Prompt:
        """Cuts one prompt into its two parts and pads each to a number of columns from the fixed series."""
        config, length = self._model.config, int(prompt.lengths[0])
        valid = prompt.image_id[0] >= 0
        image = np.flatnonzero(prompt.image_id[0][valid] > 0)
        cut = int(image[-1]) + 1 if len(image) else max(0, length - self._longest)
        before, behind = columns_before(cut), columns_behind(length - cut)
        laid_out = prompt.padded(before + behind, config.pad_token_id)
        words, images = prompt.tokens[0][valid][:cut], _keys(prompt, config)
        return Prompt(prompt, laid_out, cut, before, behind, images, digest([words, images]))


def _keys(prompt: Inputs, config: Any) -> tuple[bytes, ...]:
    if prompt.pixels is None:
        return ()
    if fixed(config, prompt):
        return tuple(digest([pixels]) for pixels in prompt.pixels)
    return (digest([prompt.pixels, prompt.owner, *prompt.geometry.items(), prompt.grids]),)


def fixed(config: Any, prompt: Inputs) -> bool:
    """Whether the tokens of every image depend on that image alone."""
    return (
        config.tokens_per_image is not None
        and not prompt.geometry
        and len(prompt.pixels) == int(prompt.owner.max()) + 1
    )
