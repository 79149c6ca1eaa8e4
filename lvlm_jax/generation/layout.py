"""Token layout: which column of which sample holds what, padded to buckets so that programs are reused.

Samples are left-padded: their last prompt tokens line up, so one scalar write index serves the whole batch and
the rows after the image are the last rows of every sample.

    column     0 ........................................ T-1
    sample 0   . . . . B <1 1 1 1> q q q q q q q q q q q q
    sample 1   B t t t t t t t <1 1 1 1> t <2 2 2 2> q q q      . padding, <k k> tokens of image k
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lvlm_jax.errors import LVLMError

PROMPT_BUCKET = 64  # prompts and caches come in multiples of this many columns
SMALLEST_WINDOW = 16  # windows of post-image rows come in powers of two from here


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A batch of prompts, ready for prefill. Host arrays.

    Attributes:
        tokens: `Int[B, T]`, left-padded; image placeholders expanded to one token per image token.
        image_id: `Int[B, T]`, 0 text, k >= 1 the sample's k-th image, -1 padding.
        pixels: `Float[I, 3, Y, X]` of all images of the batch in reading order, or None.
        source_columns: `Int[B, U]`, for each column of the arrays the user gave the column it has here
            (a padding column points to any padding column).
        image_tokens: `Float[I, P, E]`, what the tower made of `pixels`, where it has run already; else None.
    """

    tokens: np.ndarray
    image_id: np.ndarray
    pixels: np.ndarray | None
    source_columns: np.ndarray
    image_tokens: np.ndarray | None = None

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    @property
    def lengths(self) -> np.ndarray:
        """Prompt lengths in tokens, `Int[B]`."""
        return (self.image_id >= 0).sum(axis=1)

    @property
    def window(self) -> int:
        """How many of the last rows hold every sample's post-image rows, rounded up to a bucket."""
        columns = np.arange(1, self.tokens.shape[1] + 1)
        end = np.where(self.image_id > 0, columns, 0).max(axis=1)
        longest = np.where(end > 0, self.tokens.shape[1] - end, 0).max(initial=0)
        window = SMALLEST_WINDOW
        while window < longest:
            window *= 2
        return min(window, self.tokens.shape[1])

    @property
    def image_count(self) -> int:
        """The largest number of images of a sample, rounded up to a power of two; at least 1."""
        count = 1
        while count < self.image_id.max():
            count *= 2
        return count

    @property
    def image_index(self) -> np.ndarray:
        """Which image of its sample each picture of `pixels` is, from 0; `Int[I]`."""
        return np.concatenate([np.arange(row.max(initial=0)) for row in np.maximum(self.image_id, 0)])

    def without_images(self, pad_token_id: int) -> "Inputs":
        """The same prompts with their image tokens left out."""
        kept = [np.flatnonzero(row == 0) for row in self.image_id]
        return self._rebuilt(
            [row[places] for row, places in zip(self.tokens, kept, strict=True)], pad_token_id
        )

    def with_words(self, words: Sequence[int], start: int | None, pad_token_id: int) -> "Inputs":
        """The same prompts with tokens put before them, but after a leading `start` token."""
        prompts, images = [], []
        for tokens, ids in zip(self.tokens, self.image_id, strict=True):
            tokens, ids = tokens[ids >= 0], ids[ids >= 0]
            at = int(len(tokens) > 0 and tokens[0] == start)
            prompts.append(np.insert(tokens, at, words))
            images.append(np.insert(ids, at, np.zeros(len(words), ids.dtype)))
        rebuilt = self._rebuilt(prompts, pad_token_id, images)
        return dataclasses.replace(rebuilt, pixels=self.pixels, image_tokens=self.image_tokens)

    def _rebuilt(
        self, prompts: list[np.ndarray], pad_token_id: int, images: list[np.ndarray] | None = None
    ) -> "Inputs":
        """Left-pads changed prompts; without `images` they hold no image token."""
        total = bucket(max(len(prompt) for prompt in prompts))
        tokens = np.full((self.batch, total), pad_token_id, np.int32)
        image_id = np.full((self.batch, total), -1, np.int32)
        for row, prompt in enumerate(prompts):
            start = total - len(prompt)
            tokens[row, start:] = prompt
            image_id[row, start:] = 0 if images is None else images[row]
        return Inputs(tokens, image_id, None, np.zeros((self.batch, 0), np.int64))


def bucket(length: int, multiple: int = PROMPT_BUCKET) -> int:
    """`length` rounded up to a multiple, at least one of them."""
    return max(1, -(-length // multiple)) * multiple


def lay_out(
    prompts: Sequence[np.ndarray],
    columns: Sequence[np.ndarray],
    width: int,
    pixels: np.ndarray | None,
    image_token_id: int,
    tokens_per_image: int,
    pad_token_id: int,
    context_length: int,
) -> Inputs:
    """Left-pads token sequences into `Inputs` and numbers their images.

    Args:
        prompts: token ids of each sample, without padding.
        columns: where each of those tokens stood in the arrays the user gave.
        width: how many columns those arrays had.
        pixels: images of all samples in reading order.

    Raises:
        LVLMError: placeholders and images do not match, or a prompt exceeds the context.
    """
    longest = max(len(prompt) for prompt in prompts)
    if longest >= context_length:
        raise LVLMError(
            f"the prompt has {longest} tokens and the model's context is {context_length}; "
            "shorten the prompt or send fewer images"
        )
    total = bucket(longest)
    tokens = np.full((len(prompts), total), pad_token_id, np.int32)
    image_id = np.full((len(prompts), total), -1, np.int32)
    source = np.zeros((len(prompts), width), np.int64)
    found = 0
    for row, (prompt, given) in enumerate(zip(prompts, columns, strict=True)):
        start = total - len(prompt)
        is_image = np.asarray(prompt) == image_token_id
        if is_image.sum() % tokens_per_image:
            raise LVLMError(
                f"sample {row} has {is_image.sum()} image tokens, which is no multiple of the "
                f"{tokens_per_image} tokens of one image; was it truncated?"
            )
        tokens[row, start:] = prompt
        image_id[row, start:] = np.where(is_image, 1 + (np.cumsum(is_image) - 1) // tokens_per_image, 0)
        source[row, given] = np.arange(start, total)
        found += int(is_image.sum()) // tokens_per_image
    images = 0 if pixels is None else len(pixels)
    if found != images:
        raise LVLMError(
            f"the prompt has {found} image placeholders and {images} images were given; give one image for each"
        )
    return Inputs(tokens, image_id, pixels if images else None, source)
