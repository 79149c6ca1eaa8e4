"""Batches of preference pairs, and of conversations, by step number.

Text is tokenised once, when training begins, so that every length is known; pictures are opened when their batch is
made. A batch depends on nothing but its number: grain shuffles each epoch anew and wraps into the next one.

    images    Float[I, 3, Y, X]   those of all rows in reading order, then zeros
    chosen    } dicts `tokens`, `answers`, `image_id`, `columns`, see `training.forward`;
    rejected  } `answer` alone in batches of conversations
    reference Float[B, 2, A]      log-probabilities of the answer tokens, where they were computed beforehand
    ids       Int[B]              number of the row in the file, dropped ones not counted
    weight    Float[B]            1, or 0 for a row that fills up an evaluation's last batch

With `accumulate` > 1 every array has a leading axis of that size. T, A and I come in few sizes, because every new
combination compiles a program.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import logging

from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import inputs
from lvlm_jax.generation.layout import bucket
from lvlm_jax.training import answer_tokens
from lvlm_jax.training.answer_tokens import Tokens
from lvlm_jax.training.pair_files import Conversation, Pair, assistant, pictures_of

PAIR = ("chosen", "rejected")  # a pair's sequences
CONVERSATION = ("answer",)  # a conversation's one

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """One pair or conversation, tokenised.

    Attributes:
        id: what errors call it.
        images: its pictures, as in `pair_files.Pair`.
        sequences: by name, one of PAIR or CONVERSATION.
        reference: log-probabilities of the answer tokens of each sequence, in their order; None when not known.
    """

    id: str
    images: tuple
    sequences: dict[str, Tokens]
    reference: tuple[np.ndarray, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static sizes of a batch: rows B, tokens T, answer tokens A, images I."""

    rows: int
    length: int
    answers: int
    images: int


@dataclasses.dataclass(frozen=True)
class Encoder:
    """From a row to arrays, as the model of `config` reads them; picklable.

    Attributes:
        processor: the checkpoint's transformers processor.
        config: the model's configuration.
    """

    processor: Any
    config: Any

    def pair(self, pair: Pair) -> Row:
        """A pair's two sequences: the prompt, and behind it an answer to be learned."""
        answers = zip(PAIR, (pair.chosen, pair.rejected), strict=True)
        sequences = {
            name: self._tokens([*pair.prompt, assistant(text.strip())], last_only=True)
            for name, text in answers
        }
        return Row(pair.id, pair.images, sequences)

    def conversation(self, conversation: Conversation) -> Row:
        """A conversation whose every answer is learned."""
        tokens = self._tokens(conversation.messages, last_only=False)
        return Row(conversation.id, conversation.images, {CONVERSATION[0]: tokens})

    def length(self, row: Row) -> int:
        """Tokens of the row's longest sequence, those of its images included."""
        more = len(row.images) * (self.config.tokens_per_image - 1)
        return max(len(tokens.ids) for tokens in row.sequences.values()) + more

    def pixels(self, row: Row) -> np.ndarray | None:
        """`Float[n, 3, Y, X]` of a row's pictures; None without any."""
        if not row.images:
            return None
        try:
            return inputs.pixels_of(self.processor, pictures_of(row.images))
        except LVLMError as error:
            raise LVLMError(f"row {row.id}: {error}") from error

    def arrays(self, tokens: Tokens, pixels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`tokens`, `answers` and `image_id` of a sequence without padding, images expanded as at inference."""
        given = {"input_ids": tokens.ids[None]} | ({} if pixels is None else {"pixel_values": pixels})
        laid_out = inputs.from_arrays(given, self.config)
        kept = laid_out.image_id[0] >= 0
        repeats = np.where(tokens.ids == self.config.image_token_id, self.config.tokens_per_image, 1)
        return laid_out.tokens[0, kept], np.repeat(tokens.answers, repeats), laid_out.image_id[0, kept]

    def _tokens(self, messages: list[dict], last_only: bool) -> Tokens:
        return answer_tokens.encode(self.processor, self.config.eos_token_ids, messages, last_only)


def rows_of(
    examples: Sequence[Any], encode: Callable[[Any], Row], encoder: Encoder, longest: int, too_long: str
) -> tuple[Row, ...]:
    """Examples as rows.

    Args:
        encode: `encoder.pair` or `encoder.conversation`.
        longest: tokens of the longest row that is taken; no longer than the model's context in any case.
        too_long: "error", or "drop" to leave longer rows out and say how many.

    Raises:
        LVLMError: a row that is too long, or that has an image's placeholder in its text; no row is left.
    """
    if too_long not in ("error", "drop"):
        raise LVLMError(f"too_long is {too_long!r}; expected 'error' or 'drop'")
    limit = min(longest, encoder.config.text.max_position_embeddings - 1)
    rows = [encode(example) for example in examples]
    for row in rows:
        _check_placeholders(row, encoder.config.image_token_id)
    kept = tuple(row for row in rows if encoder.length(row) <= limit)
    if len(kept) < len(rows):
        first = next(row for row in rows if encoder.length(row) > limit)
        found = (
            f"{len(rows) - len(kept)} of {len(rows)} rows are longer than {limit} tokens, first {first.id} with "
            f"{encoder.length(first)}"
        )
        if too_long == "error" or not kept:
            raise LVLMError(
                f"{found}; set too_long='drop' to leave them out, or a larger length (the model's context is "
                f"{encoder.config.text.max_position_embeddings})"
            )
        logging.warning("%s; they are left out", found)
    return kept


def shape_of(rows: Sequence[Row], encoder: Encoder, count: int) -> Shape:
    """Sizes that hold any `count` rows at a time of `rows`, rounded up: I to a multiple of the row count, the
    others to buckets of the token layout."""
    most = sorted((len(row.images) for row in rows), reverse=True)[:count]
    answers = max(tokens.answers.sum() for row in rows for tokens in row.sequences.values())
    length = bucket(max(encoder.length(row) for row in rows))
    return Shape(count, length, bucket(int(answers)), bucket(sum(most), count))


def image_count(rows: Sequence[Row]) -> int:
    """The most images of a row, rounded up to a power of two; at least 1."""
    most = max(len(row.images) for row in rows)
    return 1 << max(most - 1, 0).bit_length()


def assemble(encoder: Encoder, rows: Sequence[Row], ids: Sequence[int], shape: Shape) -> Batch:
    """Up to `shape.rows` rows as one batch; the places behind the last row are padding of weight 0."""
    pixels = [encoder.pixels(row) for row in rows]
    side = encoder.config.vision.image_size
    images = np.zeros((shape.images, 3, side, side), np.float32)
    shown = [own for own in pixels if own is not None]
    if shown:
        together = np.concatenate(shown)
        images[: len(together)] = together
    number, weight = np.zeros(shape.rows, np.int32), np.zeros(shape.rows, np.float32)
    number[: len(rows)], weight[: len(rows)] = ids, 1
    batch = {"images": images, "ids": number, "weight": weight}
    for name in rows[0].sequences:
        laid_out = [encoder.arrays(row.sequences[name], own) for row, own in zip(rows, pixels, strict=True)]
        batch[name] = _padded(laid_out, shape, encoder.config.pad_token_id)
    if rows[0].reference is not None:
        batch["reference"] = np.zeros((shape.rows, len(rows[0].reference), shape.answers), np.float32)
        for index, row in enumerate(rows):
            for sequence, logprobs in enumerate(row.reference):
                batch["reference"][index, sequence, : len(logprobs)] = logprobs
    return batch


@dataclasses.dataclass(frozen=True)
class Batches:
    """Training batches by step number; picklable.

    Attributes:
        rows: the data set.
        encoder: makes arrays of them.
        batch: rows of a step.
        accumulate: parts of a step's batch, all of one shape.
        seed: of the order.
    """

    rows: tuple[Row, ...]
    encoder: Encoder
    batch: int
    accumulate: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.batch < 1 or self.accumulate < 1 or self.batch % self.accumulate:
            raise LVLMError(
                f"batch is {self.batch} and accumulate {self.accumulate}; expected a batch that can be cut into that "
                "many equal parts"
            )

    def __call__(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        order = self.order(step)
        rows = [self.rows[index] for index in order]
        size = self.batch // self.accumulate
        cuts = [slice(start, start + size) for start in range(0, self.batch, size)]
        shapes = [shape_of(rows[cut], self.encoder, size) for cut in cuts]
        shape = Shape(*(max(sizes) for sizes in zip(*map(dataclasses.astuple, shapes), strict=True)))
        parts = [assemble(self.encoder, rows[cut], order[cut], shape) for cut in cuts]
        return parts[0] if self.accumulate == 1 else _stacked(parts)

    def order(self, step: int) -> list[int]:
        """Which rows a step takes."""
        places = range(step * self.batch, (step + 1) * self.batch)
        return [int(self._shuffled[place]) for place in places]

    def describe(self, step: int) -> str:
        """The ids of a step's rows, for messages."""
        return ", ".join(self.rows[index].id for index in self.order(step))

    def steps(self, epochs: float) -> int:
        """How many steps see every row `epochs` times; at least 1."""
        return max(1, round(epochs * len(self.rows) / self.batch))

    @functools.cached_property
    def _shuffled(self) -> grain.MapDataset:
        return grain.MapDataset.range(len(self.rows)).shuffle(seed=self.seed).repeat()


def in_order(rows: Sequence[Row], encoder: Encoder, size: int) -> Iterator[Batch]:
    """All rows once, in batches of one shape, the last one filled up with rows of weight 0."""
    shape = shape_of(rows, encoder, size)
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        yield assemble(encoder, chunk, range(start, start + len(chunk)), shape)


def _check_placeholders(row: Row, image_token: int) -> None:
    for name, tokens in row.sequences.items():
        found = int((tokens.ids == image_token).sum())
        if found != len(row.images):
            raise LVLMError(
                f"row {row.id} ({name}) has {found} image placeholders for {len(row.images)} images once the chat "
                "template has been applied; do not write the placeholder into a message's text"
            )


def _padded(laid_out: Sequence[tuple], shape: Shape, pad_token: int) -> dict[str, np.ndarray]:
    """Sequences as arrays, padded on the right."""
    size = (shape.rows, shape.length)
    padded = {
        "tokens": np.full(size, pad_token, np.int32),
        "answers": np.zeros(size, bool),
        "image_id": np.full(size, -1, np.int32),
        "columns": np.zeros((shape.rows, shape.answers), np.int32),
    }
    for row, (tokens, answers, image_id) in enumerate(laid_out):
        kept = slice(len(tokens))
        padded["tokens"][row, kept] = tokens
        padded["answers"][row, kept] = answers
        padded["image_id"][row, kept] = image_id
        places = np.flatnonzero(answers)
        padded["columns"][row, : len(places)] = places
    return padded


def _stacked(parts: Sequence[Batch]) -> Batch:
    first = parts[0]
    return {
        name: _stacked([part[name] for part in parts])
        if isinstance(first[name], dict)
        else np.stack([part[name] for part in parts])
        for name in first
    }
