"""From the files that a config names to the batches of a task: what objectives have in common."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lvlm_jax.errors import LVLMError
from lvlm_jax.lvlm import LVLM
from lvlm_jax.training import loop
from lvlm_jax.training.data import columns, pair_batches, pair_files, reference
from lvlm_jax.training.data.batches import Batches
from lvlm_jax.training.data.pair_batches import Batch, Encoder, Row
from lvlm_jax.training.step import Objective
from lvlm_jax.training.validation import evaluation


@dataclasses.dataclass(frozen=True)
class Samples:
    """The samples of a run, tokenised.

    Attributes:
        model: the base model.
        config: the run's, of which the fields of all objectives are read.
        encoder: from a sample to arrays.
        train: what is learned from.
        held_out: those of `config.validation`; empty without such a file.
        shares: how often each file of `train` is drawn from, see `Batches.shares`.
    """

    model: LVLM
    config: ConfigDict
    encoder: Encoder
    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    shares: tuple[tuple[int, float], ...] = ()

    @classmethod
    def read(
        cls,
        model: LVLM,
        config: ConfigDict,
        reader: Callable[[str], Sequence[Any]],
        encode: Callable[[Encoder, Any], Row],
        kind: str,
        example: str,
    ) -> "Samples":
        """The samples of `config.data` and `config.validation`.

        Args:
            reader: from a path to what `encode` takes, such as `pair_files.read_pairs`.
            encode: a method of `Encoder`.
            kind, example: what the files hold and a name for one, for the error where none is given.

        Raises:
            LVLMError: no file is given, its samples cannot be used, or they have a column that nothing reads.
        """
        if not config.data:
            raise LVLMError(f"data is not set; give a file of {kind}, as in --config.data={example}")
        encoder = Encoder(model.processor, model.config)
        encoded = functools.partial(encode, encoder)

        def of(path: str) -> tuple[Row, ...]:
            examples = reader(path)
            columns.refuse_unused(examples, columns.words(config.ignore), path)
            return pair_batches.rows_of(examples, encoded, encoder, config.length, config.too_long)

        learned, held_out = ([of(path) for path in columns.files(paths)] for paths in (config.data, config.validation))
        shares = columns.shares(config.data_shares, [len(rows) for rows in learned])
        train, held_out = itertools.chain.from_iterable(learned), itertools.chain.from_iterable(held_out)
        rows = pair_batches.alike([*train, *held_out])
        count = sum(map(len, learned))
        return cls(model, config, encoder, rows[:count], rows[count:], shares)

    @classmethod
    def pairs(cls, model: LVLM, config: ConfigDict) -> "Samples":
        """Those of files of preference pairs; batches have `chosen` and `rejected`."""
        return cls.read(model, config, pair_files.read_pairs, Encoder.pair, "preference pairs", "pairs.jsonl")

    @classmethod
    def conversations(cls, model: LVLM, config: ConfigDict) -> "Samples":
        """Those of files of conversations, or of pairs, whose chosen answers count; batches have `answer`."""
        reader, encode = pair_files.read_conversations, Encoder.conversation
        return cls.read(model, config, reader, encode, "conversations", "conversations.jsonl")

    @property
    def image_count(self) -> int:
        """No sample has more images."""
        return pair_batches.image_count((*self.train, *self.held_out))

    @property
    def part(self) -> int:
        """How many samples go through the model at once."""
        return self.config.batch // self.config.accumulate

    def with_reference(self, score: Callable[[Any, Batch], Any], identity: dict, folder: Path) -> "Samples":
        """These samples with the log-probabilities of their answers under the base model.

        Args:
            score, identity, folder: see `reference.with_reference`, where `identity` is `settings`.
        """

        def known(rows: tuple[Row, ...]) -> tuple[Row, ...]:
            if not rows:
                return rows
            params, mesh = self.model.params, self.model.mesh
            return reference.with_reference(rows, self.encoder, score, params, identity, folder, self.part, mesh)

        return dataclasses.replace(self, train=known(self.train), held_out=known(self.held_out))

    def task(self, objective: Objective, terms: Mapping[str, float], measure: Objective | None = None) -> loop.Task:
        """The task that learns from these samples.

        Args:
            objective: (trainable, frozen, batch, key) -> metrics; pure.
            terms: which metrics are minimised, with their weights.
            measure: the metrics of held-out samples; None takes those of `objective`.
        """
        config = self.config
        source = Batches(self.train, self.encoder, config.batch, config.accumulate, config.seed, self.shares)
        judge = evaluation(measure or objective, self.held_out, self.encoder, self.part, self.model.mesh)
        return loop.Task(config.recipe, objective, terms, source, judge, source.describe)
