"""Rows of preference pairs and of conversations, and the arrays of batches.

Text is tokenised once, when training begins, so that every length is known; images are opened when their batch is made.
A batch contains:

    images    Float[R, ...]   pixels of all rows' images in reading order, as the tower's input, then zeros
    geometry  dict            further inputs of the tower, see `models.pictures.Pictures`; may be absent
    chosen    } dicts `tokens`, `answers`, `image_id`, `columns` and maybe `axes`, see `training.forward`;
    rejected  } batches of conversations have `answer` instead
    rejected_pictures  dict       `images` and `geometry` of the rejected sequence, if it has its own images
    reference Float[B, S, A]      log-probabilities of the answer tokens of S sequences, if they are precomputed
    ids       Int[B]              number of the row in the file; dropped rows do not count
    weight    Float[B]            the row's weight in the loss; 0 for a padding row of an evaluation's last batch

With `accumulate` > 1 every array has a leading axis of that size. T, A, R and the sizes of images are rounded up to
buckets, because every new combination compiles a program.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.models.pictures import Pictures
from lvlm_jax.processors import answer_tokens, inputs, templates
from lvlm_jax.processors.answer_tokens import Tokens
from lvlm_jax.processors.layout import bucket, multimodal_positions, multiple_of, number_images
from lvlm_jax.training.data import pictures
from lvlm_jax.training.data.pair_files import Conversation, Pair, assistant
from lvlm_jax.training.data.pictures import Placeholders, Runs, opened_rgb, size_of

PAIR = ("chosen", "rejected")  # a pair's sequences
CONVERSATION = ("answer",)  # a conversation's only sequence

Batch = dict[str, Any]


def pictures_of(sequence: str) -> str:
    """The key under which a batch has the own images of a sequence."""
    return f"{sequence}_pictures"


@dataclasses.dataclass(frozen=True)
class EncodedRow:
    """One pair or conversation, tokenised.

    Attributes:
        id: name of the row in errors.
        images: images of the row, as in `pair_files.Pair`.
        sequences: the sequences of tokens by name; for pairs and conversations, PAIR and CONVERSATION have the names.
        reference: log-probabilities of the answer tokens of each sequence, in order; None if unknown.
        prompt: the text up to the last answer, as the chat template writes it.
        pictures: images of the sequences that have other images than `images`, by name of the sequence.
        weight: weight of the row in the loss.
        labels: numbers that an objective needs, by name; a batch has an array `[B]` of each.
    """

    id: str
    images: tuple
    sequences: dict[str, Runs]
    reference: tuple[np.ndarray, ...] | None = None
    prompt: str = ""
    pictures: dict[str, tuple] = dataclasses.field(default_factory=dict)
    weight: float = 1.0
    labels: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static sizes of a batch: rows B, tokens T, answer tokens A, and the least number of rows of the tower."""

    rows: int
    length: int
    answers: int
    images: int


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Turns rows into arrays for the model of `config`; picklable.

    Attributes:
        processor: the checkpoint's transformers processor.
        config: the model's configuration.
    """

    processor: Any
    config: FamilyConfig

    def pair(self, pair: Pair) -> EncodedRow:
        """The row of a pair: two sequences, each the prompt followed by one of the two answers.

        Raises:
            LVLMError: (with the pair) an image is unreadable, or a text contains an image placeholder.
        """
        answers = {name: assistant(getattr(pair, name).strip()) for name in PAIR}
        others = {} if pair.rejected_images is None else {"rejected": pair.rejected_images}
        return self.row(pair, {name: [*pair.prompt, answer] for name, answer in answers.items()}, True, others)

    def conversation(self, conversation: Conversation) -> EncodedRow:
        """The row of a conversation; every answer in it is learned.

        Raises:
            LVLMError: as `pair`; or several answers about images that the model reads again with each question.
        """
        answers = sum(message["role"] == "assistant" for message in conversation.messages)
        if answers > 1 and conversation.images and self.config.reads_instruction:
            raise LVLMError(
                f"row {conversation.id} has {answers} answers about its images, which {self.config.model_type} "
                "reads again with each question; give each answer a row of its own, as the chosen one of a pair"
            )
        return self.row(conversation, {CONVERSATION[0]: conversation.messages}, False)

    def length(self, row: EncodedRow) -> int:
        """Number of tokens of the row's longest sequence, image tokens included."""
        return max(sequence.length for sequence in row.sequences.values())

    def pictures(
        self, rows: Sequence[EncodedRow], prompts: Sequence[np.ndarray], sequence: str = ""
    ) -> Pictures | None:
        """The tower's inputs for the images of some rows; None without images.

        Args:
            prompts: the tokens of one sequence of each row.
            sequence: name of the sequence whose own images to use; "" for the images that all sequences share.

        Raises:
            LVLMError: (with the row) an image is unreadable.
        """
        parts = [self._part(row, row.pictures[sequence] if sequence else row.images) for row in rows]
        with _about(f"rows {_names(rows)}"):
            return self.config.pictures(parts, prompts)

    def row(
        self,
        example: Pair | Conversation,
        messages: dict[str, list[dict]],
        last_only: bool,
        pictures: dict[str, tuple] | None = None,
    ) -> EncodedRow:
        """A row of several sequences about the images of an example.

        Args:
            messages: the messages of each sequence, by its name; all sequences have the same prompt.
            last_only: whether only the last answer is learned.
            pictures: the images of sequences with other images than the example's, by name of the sequence; every
                sequence has as many images as the example.

        Raises:
            LVLMError: as `pair`.
        """
        others = pictures or {}
        marker = inputs.image_marker(self.processor)
        sequences, prompt = {}, ""
        for name, messages_of in messages.items():
            placeholders_of = self._placeholders(example.id, others.get(name, example.images))
            with _about(f"row {example.id} ({name})"):
                count = self._text(messages_of, False).count(marker)
                if count != len(example.images):
                    raise LVLMError(
                        f"it has {count} image placeholders for {len(example.images)} images once the chat template "
                        "has been applied; do not write the placeholder into a message's text"
                    )
                tokens = self._tokens(messages_of, last_only, placeholders_of)
                inputs.check_ids(tokens.ids, self.config)
                sequences[name] = placeholders_of.laid_out(tokens, self.config)
                prompt = prompt or self._text(messages_of[:-1], True)
        return EncodedRow(example.id, example.images, sequences, prompt=prompt, pictures=others, weight=example.weight)

    def _placeholders(self, row: str, images: Sequence[Any]) -> Placeholders:
        with _about(f"row {row}"):
            if self.config.tokens_per_image is not None:  # independent of image sizes
                sizes = ((1, 1),) * len(images)
            else:
                sizes = tuple(size_of(image) for image in images)
            if sizes not in self._by_sizes:
                self._by_sizes[sizes] = pictures.placeholders(self.processor, self.config, sizes)
            return self._by_sizes[sizes]

    @functools.cached_property
    def _by_sizes(self) -> dict[tuple, Placeholders]:
        return {}

    def __reduce__(self) -> tuple:
        return Encoder, (self.processor, self.config)  # known placeholders are not needed once rows are made

    def _text(self, messages: list[dict], prompt: bool) -> str:
        """Messages as the chat template writes them; with `prompt`, the beginning of an answer follows."""
        return templates.render(self.processor, templates.in_template_form(self.processor, messages), prompt)

    def _tokens(self, messages: list[dict], last_only: bool, known: Placeholders) -> Tokens:
        stops = self.config.eos_token_ids
        return answer_tokens.encode(self.processor, stops, messages, last_only, known.expanded)

    def _part(self, row: EncodedRow, images: Sequence[Any]) -> dict[str, Any]:
        """The processor's arrays for images of a row."""
        if not images:
            return {}
        with _about(f"row {row.id}"):
            opened_images = [opened_rgb(image) for image in images]
            return inputs.run_processor(self.processor, self.config, row.prompt, opened_images)[1]


@contextlib.contextmanager
def _about(what: str) -> Iterator[None]:
    """Adds the name of the row to errors."""
    try:
        yield
    except LVLMError as error:
        raise LVLMError(f"{what}: {error}") from error


def rows_of(
    examples: Sequence[Any], encode: Callable[[Any], EncodedRow], encoder: Encoder, longest: int, too_long: str
) -> tuple[EncodedRow, ...]:
    """Examples as rows.

    Args:
        encode: makes a row of an example, as `encoder.pair` does.
        longest: largest number of tokens of a row; the model's context is always a limit.
        too_long: "error", or "drop" to leave out longer rows and report their number.

    Raises:
        LVLMError: a row is too long, or its text contains an image placeholder; or no rows remain.
    """
    if too_long not in ("error", "drop"):
        raise LVLMError(f"too_long is {too_long!r}; expected 'error' or 'drop'")
    limit = min(longest, encoder.config.text.max_position_embeddings - 1)
    rows = [encode(example) for example in examples]
    short_rows = tuple(row for row in rows if encoder.length(row) <= limit)
    if len(short_rows) < len(rows):
        first = next(row for row in rows if encoder.length(row) > limit)
        problem = (
            f"{len(rows) - len(short_rows)} of {len(rows)} rows are longer than {limit} tokens, first {first.id} with "
            f"{encoder.length(first)}"
        )
        if too_long == "error" or not short_rows:
            raise LVLMError(
                f"{problem}; set too_long='drop' to leave them out, or a larger length (the model's context is "
                f"{encoder.config.text.max_position_embeddings})"
            )
        logging.warning("%s; they are left out", problem)
    return short_rows


def alike(rows: Sequence[EncodedRow]) -> tuple[EncodedRow, ...]:
    """Gives all rows one structure: if one row has an entry of `pictures` for a sequence, all rows get one."""
    own = {name for row in rows for name in row.pictures}
    return tuple(dataclasses.replace(row, pictures=dict.fromkeys(own, row.images) | row.pictures) for row in rows)


def shape_of(rows: Sequence[EncodedRow], encoder: Encoder, count: int) -> Shape:
    """Sizes that suffice for any `count` of the rows. The number of images is a multiple of `count`; the numbers of
    tokens and answer tokens are buckets of the token layout."""
    most_images = sorted((len(row.images) for row in rows), reverse=True)[:count]
    answers = max(tokens.answers.sum() for row in rows for tokens in row.sequences.values())
    length = bucket(max(encoder.length(row) for row in rows))
    return Shape(count, length, bucket(int(answers)), multiple_of(count, sum(most_images)))


def image_count(rows: Sequence[EncodedRow]) -> int:
    """The largest number of images in a row, rounded up to a power of two; at least 1."""
    largest = max(len(row.images) for row in rows)
    return 1 << max(largest - 1, 0).bit_length()


def assemble(encoder: Encoder, rows: Sequence[EncodedRow], ids: Sequence[int], shape: Shape) -> Batch:
    """Up to `shape.rows` rows as one batch; the rest is padding with weight 0.

    Raises:
        LVLMError: (with the row) an image is unreadable.
    """
    number, weight = np.zeros(shape.rows, np.int32), np.zeros(shape.rows, np.float32)
    number[: len(rows)], weight[: len(rows)] = ids, [row.weight for row in rows]
    batch = {"ids": number, "weight": weight}
    for label in rows[0].labels:
        batch[label] = np.zeros(shape.rows, np.float32)
        batch[label][: len(rows)] = [row.labels[label] for row in rows]
    images = {}
    for name in rows[0].sequences:
        tokens = [row.sequences[name].tokens() for row in rows]
        own = name if name in rows[0].pictures else ""
        if own not in images:
            images[own] = encoder.pictures(rows, [sequence.ids for sequence in tokens], own)
            # A tower needs some input in any case.
            pixels = encoder.config.blank() if images[own] is None else images[own]
            arrays = pictures.arrays_of(pixels, max(shape.images, multiple_of(shape.rows, len(pixels.pixels))))
            batch |= {pictures_of(own): arrays} if own else arrays
        with _about(f"rows {_names(rows)}"):
            places = [sequence.ids == encoder.config.image_token_id for sequence in tokens]
            image_id = number_images(places, images[own])
        batch[name] = _padded(tokens, image_id, shape, encoder.config.pad_token_id)
        grids = (images[own] or encoder.config.blank()).grids
        if grids is not None:
            # Rows come first, as everywhere in a batch.
            batch[name]["axes"] = multimodal_positions(batch[name]["image_id"], grids).swapaxes(0, 1)
    if rows[0].reference is not None:
        batch["reference"] = np.zeros((shape.rows, len(rows[0].reference), shape.answers), np.float32)
        for index, row in enumerate(rows):
            for sequence, logprobs in enumerate(row.reference):
                batch["reference"][index, sequence, : len(logprobs)] = logprobs
    return batch


def in_order(rows: Sequence[EncodedRow], encoder: Encoder, size: int) -> Iterator[Batch]:
    """All rows once, in batches of one shape; the last one is padded with rows of weight 0."""
    shape = shape_of(rows, encoder, size)
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        yield assemble(encoder, chunk, range(start, start + len(chunk)), shape)


def _names(rows: Sequence[EncodedRow]) -> str:
    return ", ".join(row.id for row in rows)


def _padded(
    sequences: Sequence[Tokens], image_id: Sequence[np.ndarray], shape: Shape, pad_token: int
) -> dict[str, np.ndarray]:
    """Sequences as arrays, padded on the right."""
    size = (shape.rows, shape.length)
    padded = {
        "tokens": np.full(size, pad_token, np.int32),
        "answers": np.zeros(size, bool),
        "image_id": np.full(size, -1, np.int32),
        "columns": np.zeros((shape.rows, shape.answers), np.int32),
    }
    for row, ((tokens, answers), numbers) in enumerate(zip(sequences, image_id, strict=True)):
        columns = slice(len(tokens))
        padded["tokens"][row, columns] = tokens
        padded["answers"][row, columns] = answers
        padded["image_id"][row, columns] = numbers
        places = np.flatnonzero(answers)
        padded["columns"][row, : len(places)] = places
    return padded
