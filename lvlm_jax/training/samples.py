"""Reads the files that a config names, and makes batches of them; shared by the objectives."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lvlm_jax.errors import LVLMError
from lvlm_jax.lvlm import LVLM
from lvlm_jax.methods import Method
from lvlm_jax.training import answers, loop
from lvlm_jax.training.answers import AnsweredPrompt
from lvlm_jax.training.data import columns, pair_batches, pair_files, reference
from lvlm_jax.training.data.batches import Batches
from lvlm_jax.training.data.pair_batches import Batch, EncodedRow, Encoder
from lvlm_jax.training.step import Objective
from lvlm_jax.training.validation import evaluation


@dataclasses.dataclass(frozen=True)
class Samples:
    """The samples of a run, tokenised.

    Attributes:
        model: the base model.
        config: the run's config; only fields that all objectives have are read.
        encoder: converts a sample to arrays.
        train: the training samples.
        held_out: the samples of `config.validation`; empty without such a file.
        answer_prompts: held-out prompts that the model answers during training.
        shares: how often each training file is drawn from, see `Batches.shares`.
    """

    model: LVLM
    config: ConfigDict
    encoder: Encoder
    train: tuple[EncodedRow, ...]
    held_out: tuple[EncodedRow, ...]
    shares: tuple[tuple[int, float], ...] = ()
    answer_prompts: tuple[AnsweredPrompt, ...] = ()

    @classmethod
    def read(
        cls,
        model: LVLM,
        config: ConfigDict,
        reader: Callable[[str], Sequence[Any]],
        encode: Callable[[Encoder, Any], EncodedRow],
        kind: str,
        example: str,
    ) -> "Samples":
        """Reads the samples of `config.data` and `config.validation`.

        Args:
            reader: reads the examples of a file, as `pair_files.read_pairs` does.
            encode: (encoder, example) -> row, such as `Encoder.pair`.
            kind, example: the content of the files and an example of a file name, for the error if none is given.

        Raises:
            LVLMError: no file is given, its samples cannot be used, or they have a column that is not read.
        """
        if not config.data:
            raise LVLMError(f"data is not set; give a file of {kind}, as in --config.data={example}")
        encoder = Encoder(model.processor, model.config)
        encoded = functools.partial(encode, encoder)

        def examples_of(path: str) -> Sequence[Any]:
            examples = reader(path)
            columns.refuse_unused(examples, columns.words(config.ignore), path)
            return examples

        def rows_of(examples: Sequence[Any]) -> tuple[EncodedRow, ...]:
            return pair_batches.rows_of(examples, encoded, encoder, config.length, config.too_long)

        files = [rows_of(examples_of(path)) for path in columns.files(config.data)]
        held_out = [example for path in columns.files(config.validation) for example in examples_of(path)]
        train = [row for rows in files for row in rows]
        rows = pair_batches.alike([*train, *(rows_of(held_out) if held_out else ())])
        shares = columns.shares(config.data_shares, list(map(len, files)))
        examples_to_answer = answers.chosen(held_out, config.loop.answers)
        return cls(model, config, encoder, rows[: len(train)], rows[len(train) :], shares, examples_to_answer)

    @classmethod
    def pairs(cls, model: LVLM, config: ConfigDict) -> "Samples":
        """Reads files of preference pairs; batches have `chosen` and `rejected`."""
        return cls.read(model, config, pair_files.read_pairs, Encoder.pair, "preference pairs", "pairs.jsonl")

    @classmethod
    def conversations(cls, model: LVLM, config: ConfigDict) -> "Samples":
        """Reads files of conversations, or of pairs (only their chosen answers); batches have `answer`."""
        reader, encode = pair_files.read_conversations, Encoder.conversation
        return cls.read(model, config, reader, encode, "conversations", "conversations.jsonl")

    @property
    def image_count(self) -> int:
        """The largest number of images in a sample."""
        return pair_batches.image_count((*self.train, *self.held_out))

    @property
    def part(self) -> int:
        """Number of samples that go through the model at once."""
        return self.config.batch // self.config.accumulate

    @property
    def source(self) -> Batches:
        """The training batches."""
        of = self.config
        return Batches(self.train, self.encoder, of.batch, of.accumulate, of.seed, self.shares, of.length_groups)

    @property
    def seen_again(self) -> bool:
        """Whether at least one whole batch of the samples is used a second time."""
        steps = self.config.steps or self.source.steps(self.config.epochs)
        return (steps - 1) * self.config.batch >= len(self.train)

    def with_reference(self, score: Callable[[Any, Batch], Any], identity: dict, folder: Path) -> "Samples":
        """These samples with the log-probabilities of their answers under the base model.

        Args:
            score, identity, folder: see `reference.with_reference`; `identity` is its `settings`.
        """

        def known(rows: tuple[EncodedRow, ...]) -> tuple[EncodedRow, ...]:
            if not rows:
                return rows
            params, mesh = self.model.params, self.model.mesh
            return reference.with_reference(rows, self.encoder, score, params, identity, folder, self.part, mesh)

        return dataclasses.replace(self, train=known(self.train), held_out=known(self.held_out))

    def task(
        self,
        objective: Objective,
        terms: Mapping[str, float],
        measure: Objective | None = None,
        method: Method | None = None,
    ) -> loop.Task:
        """The task of learning from these samples.

        Args:
            objective: (trainable, frozen, batch, key) -> metrics; pure.
            terms: weights of the metrics that are minimised.
            measure: the metrics of held-out samples; by default those of `objective`.
            method: the method under which held-out prompts are answered; None for no method.
        """
        config = self.config
        source = self.source
        judge = evaluation(measure or objective, self.held_out, self.encoder, self.part, self.model.mesh)
        generate_answers = functools.partial(
            answers.generate_answers, self.model, self.answer_prompts, config.loop.answer_tokens, self.part, method
        )
        return loop.Task(
            config.recipe,
            objective,
            terms,
            source,
            judge,
            source.describe,
            generate_answers if self.answer_prompts else None,
        )
