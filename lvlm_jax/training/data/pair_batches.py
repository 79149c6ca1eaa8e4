"""Batches of preference pairs, and of conversations, by step number.

Text is tokenised once, when training begins, so that every length is known; pictures are opened when their batch is
made. A batch depends on nothing but its number: grain shuffles each epoch anew and wraps into the next one.

    images    Float[R, ...]   pixels of all rows' pictures in reading order as the tower takes them, then zeros
    geometry  dict            what the tower must know besides, see `models.pictures.Pictures`; absent where nothing
    chosen    } dicts `tokens`, `answers`, `image_id`, `columns` and maybe `axes`, see `training.forward`;
    rejected  } `answer` alone in batches of conversations
    reference Float[B, 2, A]      log-probabilities of the answer tokens, where they were computed beforehand
    ids       Int[B]              number of the row in the file, dropped ones not counted
    weight    Float[B]            1, or 0 for a row that fills up an evaluation's last batch

With `accumulate` > 1 every array has a leading axis of that size. T, A, R and the sizes of pictures come in buckets,
because every new combination compiles a program.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import logging

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.models.pictures import Pictures
from lvlm_jax.processors import inputs, templates
from lvlm_jax.processors.images import image_size, open_image
from lvlm_jax.processors.layout import bucket, multimodal_positions, multiple_of, number_images
from lvlm_jax.training.data import answer_tokens, pictures
from lvlm_jax.training.data.answer_tokens import Tokens
from lvlm_jax.training.data.pair_files import Conversation, Pair, assistant
from lvlm_jax.training.data.pictures import Placeholders, Runs

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
        prompt: the text up to the last answer, as the chat template writes it.
    """

    id: str
    images: tuple
    sequences: dict[str, Runs]
    reference: tuple[np.ndarray, ...] | None = None
    prompt: str = ""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static sizes of a batch: rows B, tokens T, answer tokens A, at least so many rows of the tower."""

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
    config: FamilyConfig

    def pair(self, pair: Pair) -> Row:
        """A pair's two sequences: the prompt, and behind it an answer to be learned.

        Raises:
            LVLMError: naming the pair: a picture that cannot be read, or an image's placeholder in a text.
        """
        answers = {name: assistant(getattr(pair, name).strip()) for name in PAIR}
        return self._row(pair, {name: [*pair.prompt, answer] for name, answer in answers.items()}, True)

    def conversation(self, conversation: Conversation) -> Row:
        """A conversation whose every answer is learned.

        Raises:
            LVLMError: as `pair`; or several answers about pictures that the model reads anew with each question.
        """
        answers = sum(message["role"] == "assistant" for message in conversation.messages)
        if answers > 1 and conversation.images and self.config.reads_instruction:
            raise LVLMError(
                f"row {conversation.id} has {answers} answers about its pictures, which {self.config.model_type} "
                "reads anew with each question; give each answer a row of its own, as the chosen one of a pair"
            )
        return self._row(conversation, {CONVERSATION[0]: conversation.messages}, False)

    def length(self, row: Row) -> int:
        """Tokens of the row's longest sequence, those of its images included."""
        return max(sequence.length for sequence in row.sequences.values())

    def pictures(self, rows: Sequence[Row], prompts: Sequence[np.ndarray]) -> Pictures | None:
        """What the tower takes of the pictures of some rows; None without any.

        Args:
            prompts: the tokens of one sequence of each row.

        Raises:
            LVLMError: naming the row: a picture that cannot be read.
        """
        parts = [self._part(row) for row in rows]
        with _about(f"rows {_names(rows)}"):
            return self.config.pictures(parts, prompts)

    def _row(self, example: Pair | Conversation, messages: dict[str, list[dict]], last_only: bool) -> Row:
        row = f"row {example.id}"
        known = self._placeholders(example)
        marker = inputs.image_marker(self.processor)
        sequences, prompt = {}, ""
        for name, said in messages.items():
            with _about(f"{row} ({name})"):
                found = self._text(said, False).count(marker)
            if found != len(example.images):
                raise LVLMError(
                    f"{row} ({name}) has {found} image placeholders for {len(example.images)} images once the chat "
                    "template has been applied; do not write the placeholder into a message's text"
                )
            with _about(f"{row} ({name})"):
                tokens = self._tokens(said, last_only, known)
                inputs.check_ids(tokens.ids, self.config)
                sequences[name] = known.laid_out(tokens, self.config)
                prompt = prompt or self._text(said[:-1], True)
        return Row(example.id, example.images, sequences, prompt=prompt)

    def _placeholders(self, example: Pair | Conversation) -> Placeholders:
        with _about(f"row {example.id}"):
            if self.config.tokens_per_image is not None:  # whatever their sizes
                sizes = ((1, 1),) * len(example.images)
            else:
                sizes = tuple(image_size(image) for image in example.images)
            if sizes not in self._by_sizes:
                self._by_sizes[sizes] = pictures.placeholders(self.processor, self.config, sizes)
            return self._by_sizes[sizes]

    @functools.cached_property
    def _by_sizes(self) -> dict[tuple, Placeholders]:
        return {}

    def __reduce__(self) -> tuple:
        return Encoder, (self.processor, self.config)  # sizes are known once rows are made

    def _text(self, messages: list[dict], prompt: bool) -> str:
        """Messages as the chat template writes them; with `prompt` up to where an answer begins."""
        return templates.render(self.processor, templates.suited(self.processor, messages), prompt)

    def _tokens(self, messages: list[dict], last_only: bool, known: Placeholders) -> Tokens:
        stops = self.config.eos_token_ids
        return answer_tokens.encode(self.processor, stops, messages, last_only, known.expanded)

    def _part(self, row: Row) -> dict[str, Any]:
        """What the processor makes of a row's pictures."""
        if not row.images:
            return {}
        with _about(f"row {row.id}"):
            opened = [open_image(image) for image in row.images]
            return inputs.processed(self.processor, self.config, row.prompt, opened)[1]


@contextlib.contextmanager
def _about(what: str) -> Iterator[None]:
    """Errors say what they are about."""
    try:
        yield
    except LVLMError as error:
        raise LVLMError(f"{what}: {error}") from error


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
    return Shape(count, length, bucket(int(answers)), multiple_of(count, sum(most)))


def image_count(rows: Sequence[Row]) -> int:
    """The most images of a row, rounded up to a power of two; at least 1."""
    most = max(len(row.images) for row in rows)
    return 1 << max(most - 1, 0).bit_length()


def assemble(encoder: Encoder, rows: Sequence[Row], ids: Sequence[int], shape: Shape) -> Batch:
    """Up to `shape.rows` rows as one batch; the places behind the last row are padding of weight 0.

    Raises:
        LVLMError: naming the row: a picture that cannot be read.
    """
    sequences = {name: [row.sequences[name].tokens() for row in rows] for name in rows[0].sequences}
    first = next(iter(sequences.values()))
    seen = encoder.pictures(rows, [tokens.ids for tokens in first])
    # A tower takes something in any case.
    shown = encoder.config.blank() if seen is None else seen
    batch = pictures.arrays_of(shown, max(shape.images, multiple_of(shape.rows, len(shown.pixels))))
    number, weight = np.zeros(shape.rows, np.int32), np.zeros(shape.rows, np.float32)
    number[: len(rows)], weight[: len(rows)] = ids, 1
    batch |= {"ids": number, "weight": weight}
    for name, tokens in sequences.items():
        with _about(f"rows {_names(rows)}"):
            image_id = number_images([own.ids == encoder.config.image_token_id for own in tokens], seen)
        batch[name] = _padded(tokens, image_id, shape, encoder.config.pad_token_id)
        if shown.grids is not None:
            # Rows come first, as everywhere in a batch.
            batch[name]["axes"] = multimodal_positions(batch[name]["image_id"], shown.grids).swapaxes(0, 1)
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


def _names(rows: Sequence[Row]) -> str:
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
        kept = slice(len(tokens))
        padded["tokens"][row, kept] = tokens
        padded["answers"][row, kept] = answers
        padded["image_id"][row, kept] = numbers
        places = np.flatnonzero(answers)
        padded["columns"][row, : len(places)] = places
    return padded


def _stacked(parts: Sequence[Batch]) -> Batch:
    first = parts[0]
    return {
        name: _stacked([part[name] for part in parts])
        if isinstance(first[name], dict)
        else pictures.stacked([part[name] for part in parts])
        for name in first
    }
