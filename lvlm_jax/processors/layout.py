"""Token layout: what each column of each sample contains, padded to buckets so that programs are reused.

Samples are left-padded: their last prompt tokens are aligned, so that one scalar write index serves the whole batch,
and the rows after the images are the last rows of every sample.

    column     0 ........................................ T-1
    sample 0   . . . . B <1 1 1 1> q q q q q q q q q q q q
    sample 1   B t t t t t t t <1 1 1 1> t <2 2 2 2> q q q      . padding, <k k> tokens of image k
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.pictures import Pictures, round_up_to_bucket

PROMPT_BUCKET = 64  # the smallest number of columns of prompts and caches
# A bucket besides those of `round_up_to_bucket`: it fits the 576 image tokens of LLaVA-1.5 and a question, for which
# 768 columns would be a fifth slower.
FIXED_IMAGE = 640
FEWEST_TAIL_ROWS = 16  # the smallest `tail_rows`; larger ones are powers of two


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A batch of prompts, ready for prefill. Host arrays.

    Attributes:
        tokens: `Int[B, T]`, left-padded, with one placeholder per image token.
        image_id: `Int[B, T]`, 0 for text, k >= 1 for the sample's k-th image, -1 for padding.
        pixels, owner, geometry, grids: the `Pictures` of all images of the batch in reading order; pixels is None
            without images.
        source_columns: `Int[B, U]`, for each column of the user's arrays, its column here (for a padding column, any
            padding column).
        image_tokens: `Float[*N, E]`, the tower's output for `pixels` if it has already run; else None.
        system: `Int[B, 2]`, first column of each sample's system prompt and the column after it, equal if there is
            none; None if unknown.
    """

    tokens: np.ndarray
    image_id: np.ndarray
    pixels: np.ndarray | None
    source_columns: np.ndarray
    image_tokens: np.ndarray | None = None
    owner: np.ndarray | None = None
    geometry: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    grids: np.ndarray | None = None
    system: np.ndarray | None = None

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    @property
    def lengths(self) -> np.ndarray:
        """Prompt lengths in tokens, `Int[B]`."""
        return (self.image_id >= 0).sum(axis=1)

    @property
    def tail_rows(self) -> int:
        """How many of the last rows contain the post-image rows of every sample, rounded up to a bucket."""
        columns = np.arange(1, self.tokens.shape[1] + 1)
        end = np.where(self.image_id > 0, columns, 0).max(axis=1)
        longest = np.where(end > 0, self.tokens.shape[1] - end, 0).max(initial=0)
        tail_rows = FEWEST_TAIL_ROWS
        while tail_rows < longest:
            tail_rows *= 2
        return min(tail_rows, self.tokens.shape[1])

    @property
    def image_count(self) -> int:
        """The largest number of images of a sample, rounded up to a power of two; at least 1."""
        count = 1
        while count < self.image_id.max():
            count *= 2
        return count

    @property
    def pictures(self) -> Pictures | None:
        """The images of all samples, as the family's configuration returned them; None without images."""
        if self.pixels is None:
            return None
        counts = [np.bincount(row[row > 0])[1:] for row in self.image_id]
        return Pictures(self.pixels, self.owner, np.concatenate(counts), self.geometry, self.grids)

    @property
    def image_index(self) -> np.ndarray:
        """Index of each row of `pixels` (an image or a tile) within its sample, from 0; 0 for filler rows. `Int[R]`."""
        per_sample = np.maximum(self.image_id, 0).max(axis=1)
        sample = np.repeat(np.arange(self.batch), per_sample)
        index, counts = np.zeros(len(self.owner), np.int64), np.zeros(self.batch, np.int64)
        for row, image in enumerate(self.owner):
            if image >= 0:
                index[row] = counts[sample[image]]
                counts[sample[image]] += 1
        return index

    @property
    def picture_index(self) -> np.ndarray:
        """Index of the image of each row of `pixels` within its sample, from 0; 0 for filler rows. `Int[R]`."""
        counts = np.maximum(self.image_id, 0).max(axis=1)
        image_numbers = np.concatenate([np.arange(count) for count in counts])
        return np.where(self.owner >= 0, image_numbers[np.maximum(self.owner, 0)], 0)

    @property
    def axes(self) -> np.ndarray | None:
        """Positions along time, height and width, `Int[3, B, T]`; None if the model has one position axis."""
        return None if self.grids is None else multimodal_positions(self.image_id, self.grids)

    def padded(self, columns: int, pad_token_id: int) -> "Inputs":
        """The same prompts in `columns` columns, at least as many as the longest needs."""
        valid = [row >= 0 for row in self.image_id]
        tokens = np.full((self.batch, columns), pad_token_id, np.int32)
        image_id = np.full((self.batch, columns), -1, np.int32)
        for row, is_token in enumerate(valid):
            start = columns - int(is_token.sum())
            tokens[row, start:], image_id[row, start:] = self.tokens[row][is_token], self.image_id[row][is_token]
        return self._with_pictures(Inputs(tokens, image_id, None, np.arange(columns)[None].repeat(self.batch, axis=0)))

    def without_images(self, pad_token_id: int) -> "Inputs":
        """The same prompts without their image tokens."""
        text_columns = [np.flatnonzero(row == 0) for row in self.image_id]
        return self._rebuilt([row[places] for row, places in zip(self.tokens, text_columns, strict=True)], pad_token_id)

    def with_answers(self, answers: Sequence[Sequence[int]], pad_token_id: int) -> "Inputs":
        """The same prompts followed by answers."""
        valid = [row >= 0 for row in self.image_id]
        pairs = list(zip(valid, answers, strict=True))
        prompts = [np.append(row[is_token], answer) for row, (is_token, answer) in zip(self.tokens, pairs, strict=True)]
        images = [
            np.append(row[is_token], np.zeros(len(answer)))
            for row, (is_token, answer) in zip(self.image_id, pairs, strict=True)
        ]
        return self._with_pictures(self._rebuilt(prompts, pad_token_id, images))

    def with_words(self, words: Sequence[int], start: int | None, pad_token_id: int) -> "Inputs":
        """The same prompts with other words instead of their system prompts.

        If a sample has no system prompt, the words come first, but after a leading `start` token.
        """
        prompts, images = [], []
        spans = np.zeros((self.batch, 2), int) if self.system is None else self.system
        for tokens, ids, (first, end) in zip(self.tokens, self.image_id, spans, strict=True):
            padding = int((ids < 0).sum())  # all padding is on the left
            tokens, ids = tokens[padding:], ids[padding:]
            if first == end:
                first = end = padding + int(len(tokens) > 0 and tokens[0] == start)
            head, tail = slice(first - padding), slice(end - padding, None)
            prompts.append(np.concatenate([tokens[head], words, tokens[tail]]).astype(tokens.dtype))
            text = np.zeros(len(words), ids.dtype)
            images.append(np.concatenate([ids[head], text, ids[tail]]))
        return self._with_pictures(self._rebuilt(prompts, pad_token_id, images))

    def _with_pictures(self, rebuilt: "Inputs") -> "Inputs":
        pictures = ("pixels", "owner", "geometry", "grids", "image_tokens")
        return dataclasses.replace(rebuilt, **{name: getattr(self, name) for name in pictures})

    def _rebuilt(
        self, prompts: list[np.ndarray], pad_token_id: int, images: list[np.ndarray] | None = None
    ) -> "Inputs":
        """Left-pads changed prompts; without `images` they contain no image token."""
        longest = max(len(prompt) for prompt in prompts)
        total = bucket(longest)
        tokens = np.full((self.batch, total), pad_token_id, np.int32)
        image_id = np.full((self.batch, total), -1, np.int32)
        for row, prompt in enumerate(prompts):
            start = total - len(prompt)
            tokens[row, start:] = prompt
            image_id[row, start:] = 0 if images is None else images[row]
        return Inputs(tokens, image_id, None, np.tile(np.arange(total - longest, total), (self.batch, 1)))


def bucket(length: int) -> int:
    """Rounds `length` up to a number of columns: 64, 96, 128, 192, 256, ... and 640.

    At most a third of the columns is padding, and images of any size lead to only about twenty prompt lengths.
    """
    columns = max(PROMPT_BUCKET, round_up_to_bucket(length, PROMPT_BUCKET // 2))
    return FIXED_IMAGE if length <= FIXED_IMAGE < columns and length > 512 else columns


def multiple_of(step: int, length: int) -> int:
    """Rounds `length` up to a multiple of `step`, at least one `step`."""
    return max(1, -(-length // step)) * step


def multimodal_positions(image_id: Int[np.ndarray, "B T"], grids: Int[np.ndarray, "I 2"]) -> Int[np.ndarray, "3 B T"]:
    """Positions along time, height and width.

    Text advances along all three axes. An image begins at the next position, and its tokens lie on a grid from there;
    the text after it continues beyond the image's longer side.

    Args:
        image_id: 0 for text, k >= 1 for the sample's k-th image, -1 for padding, on either side.
        grids: rows and columns of each image's tokens, in reading order.
    """
    axes = np.zeros((3, *image_id.shape), np.int32)
    sizes = iter(grids.tolist())
    for row, ids in enumerate(image_id):
        tokens = np.flatnonzero(ids >= 0)
        column, end = (tokens[0], tokens[-1] + 1) if len(tokens) else (0, 0)
        place = 0
        while column < end:
            span = slice(column, column + 1)
            if ids[column] > 0:
                height, width = next(sizes)
                span = slice(column, column + height * width)
                axes[0, row, span] = place
                axes[1, row, span] = place + np.repeat(np.arange(height), width)
                axes[2, row, span] = place + np.tile(np.arange(width), height)
                place += max(height, width)
            else:
                axes[:, row, span] = place
                place += 1
            column = span.stop
    return axes


def lay_out(
    prompts: Sequence[np.ndarray],
    columns: Sequence[np.ndarray],
    width: int,
    pictures: Pictures | None,
    image_token_id: int,
    pad_token_id: int,
    context_length: int,
) -> Inputs:
    """Left-pads token sequences into `Inputs` and numbers their images.

    Args:
        prompts: token ids of each sample, without padding.
        columns: the columns of these tokens in the user's arrays.
        width: number of columns of the user's arrays.
        pictures: images of all samples in reading order.

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
    numbers = number_images([np.asarray(prompt) == image_token_id for prompt in prompts], pictures)
    for row, (prompt, source_column) in enumerate(zip(prompts, columns, strict=True)):
        start = total - len(prompt)
        tokens[row, start:] = prompt
        image_id[row, start:] = numbers[row]
        source[row, source_column] = np.arange(start, total)
    if pictures is None:
        return Inputs(tokens, image_id, None, source)
    return Inputs(
        tokens,
        image_id,
        pictures.pixels,
        source,
        owner=pictures.owner,
        geometry=pictures.geometry,
        grids=pictures.grids,
    )


def number_images(placeholders: Sequence[np.ndarray], pictures: Pictures | None) -> list[np.ndarray]:
    """`image_id` of every token of every sample, from the masks of placeholders.

    Raises:
        LVLMError: placeholders and images do not match.
    """
    counts = np.zeros(0, np.int64) if pictures is None else pictures.token_counts
    ends = np.cumsum(counts)
    counts_by_sample = [int(mask.sum()) for mask in placeholders]
    size = int(counts[0]) if len(set(counts.tolist())) == 1 else 0
    if size and sum(counts_by_sample) % size == 0 and sum(counts_by_sample) != ends[-1]:
        raise LVLMError(
            f"the prompt has {sum(counts_by_sample) // size} image placeholders and {len(counts)} images were given; "
            "give one image for each"
        )
    numbers, num_taken = [], 0
    for row, (mask, count) in enumerate(zip(placeholders, counts_by_sample, strict=True)):
        image = np.searchsorted(ends, num_taken + np.arange(count), side="right")
        num_taken += count
        if count and num_taken not in ends:
            raise LVLMError(
                f"sample {row} has {count} image tokens, which do not fill whole images: the {len(counts)} images take "
                f"{', '.join(map(str, counts[:8])) or 'none'}; give one image for each, and do not truncate the prompt"
            )
        number = np.zeros(len(mask), np.int32)
        number[mask] = image - image[0] + 1 if count else 0
        numbers.append(number)
    if num_taken != ends[-1:].sum():
        raise LVLMError(
            f"the prompt has {num_taken} image tokens and its {len(counts)} images take {ends[-1]}; "
            "give one image for each placeholder"
        )
    return numbers
