"""Data of flow alignment: conversations with given answers, or with answers of the teacher (the model under SEVI).

Answers only determine the rows in which teacher and student are compared, so the model's own answers are good enough;
the teacher's answers are similar to those that the trained student will write.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.journal.log import AnswerLog, text_of
from lvlm_jax.journal.progress import Progress
from lvlm_jax.journal.record import file_hash, run_record
from lvlm_jax.lvlm import LVLM
from lvlm_jax.methods import Method
from lvlm_jax.processors.layout import multiple_of
from lvlm_jax.training.data import dataset_info, pair_files
from lvlm_jax.training.data.batches import Batches
from lvlm_jax.training.data.pair_batches import Batch
from lvlm_jax.training.data.pair_files import Conversation
from lvlm_jax.training.data.pair_formats import ANSWERS
from lvlm_jax.training.data.prompts import Prompt, read_prompts

STAGES = ("1", "2", "both")
ROOM_STEP = 16  # answer columns are a multiple of this many tokens, because every number compiles another program


@dataclasses.dataclass(frozen=True)
class Staged:
    """Batches with an array `stage` Int[B], the stage of flow alignment in which each sample is; picklable.

    Attributes:
        batches: the batches.
        stage: one of STAGES; "both" is stage 1 for the first half of the steps and stage 2 for the second.
        total: number of steps.
    """

    batches: Batches
    stage: str
    total: int

    def __call__(self, step: int) -> Batch:
        """The batch of a step, from 0."""
        batch = self.batches(step)
        return batch | {"stage": np.full(batch["weight"].shape, self.at(step), np.int32)}

    def at(self, step: int) -> int:
        """The stage of a step: 1 or 2."""
        return int(self.stage) if self.stage != "both" else 1 + (2 * step >= self.total)

    def steps(self, epochs: float) -> int:
        """See `Batches.steps`."""
        return self.batches.steps(epochs)

    def describe(self, step: int) -> str:
        """The ids of a step's rows, for messages."""
        return self.batches.describe(step)


def read(
    path: str | Path, model: LVLM, method: Method, longest: int, batch_size: int, folder: Path
) -> list[Conversation]:
    """The conversations of a file, each with an answer.

    Args:
        path: a file of conversations or of preference pairs (their chosen answers), as for `read_conversations`; or of
            prompts, as for `read_prompts`, optionally with an answer in the field `answer`. Missing answers are
            generated greedily, once, and logged in `folder`.
        model, method: generate the answers.
        longest: largest number of tokens of a prompt with its answer.
        batch_size: number of prompts that are answered together.
        folder: folder of the logs; a log's name is a hash of everything that determines the answers.

    Raises:
        LVLMError: an unusable file, a prompt without room for an answer, or missing answers in a run with several
            processes.
    """
    if not _asks(path):
        return pair_files.read_conversations(path)
    prompts = read_prompts(path)
    answers = {prompt.id: _answer_of(prompt) for prompt in prompts if "answer" in prompt.extra}
    missing = [prompt for prompt in prompts if prompt.id not in answers]
    if missing:
        settings = {"data": file_hash(files.expand(path)), "length": longest}
        record = run_record(model.folder, _dtype(model), method, settings)
        name = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:32]
        log = folder / f"{name}.jsonl"
        answers |= generate(missing, model, method, longest, batch_size, log, record)
    return [
        Conversation(
            prompt.images,
            [*prompt.messages, pair_files.assistant(answers[prompt.id])],
            prompt.id,
            {name: value for name, value in prompt.extra.items() if name != "answer"},
        )
        for prompt in prompts
    ]


def generate(
    prompts: Sequence[Prompt],
    model: LVLM,
    method: Method,
    longest: int,
    batch_size: int,
    log: Path,
    record: Mapping[str, Any],
) -> dict[str, str]:
    """Greedy answers by prompt id, from the log or from the model; see `read`.

    Args:
        record: everything that determines the answers, as JSON values; it is the first line of the log.
    """
    if jax.process_count() > 1:
        raise LVLMError(
            f"{len(prompts)} prompts have no answer, and several processes cannot generate them; give each line a "
            "field answer, such as lvlm infer with --method sevi writes"
        )
    ids = {prompt.id for prompt in prompts}
    with AnswerLog(log, record, text_of("answer"), ids) as answers:
        known = dict(answers.answers)
        waiting = [prompt for prompt in prompts if prompt.id not in known]
        # Similar prompts are batched together, so that there is little padding and few programs are compiled.
        waiting.sort(key=lambda prompt: (len(prompt.images), len(prompt.text)))
        with Progress(len(prompts), len(known), "answers") as progress:
            for start in range(0, len(waiting), batch_size):
                batch = waiting[start : start + batch_size]
                padded = [*batch, *[batch[-1]] * (batch_size - len(batch))]  # the last batch is padded to full size
                prepared = model.prepare([prompt.conversation() for prompt in padded])
                max_new_tokens = longest - multiple_of(ROOM_STEP, int(prepared.lengths.max()))
                if max_new_tokens < 1:
                    raise LVLMError(
                        f"a prompt like {batch[-1].id} has {prepared.lengths.max()} tokens, which leaves no room for "
                        f"an answer in a row of {longest}; set a larger length, or shorten the prompt"
                    )
                texts = model.generate(prepared, method=method, max_new_tokens=max_new_tokens).text
                fresh = {prompt.id: text for prompt, text in zip(batch, texts, strict=False)}
                answers.append({"id": name, "answer": text} for name, text in fresh.items())
                known |= fresh
                progress.update(len(batch))
    return known


def _asks(path: str | Path) -> bool:
    """Whether a file contains prompts instead of preference pairs or conversations."""
    if dataset_info.FILE in str(path):
        return False
    _, _, row = next(pair_files.read_rows(files.expand(path), "conversation file"))
    return "prompt" in row and not row.keys() & set(ANSWERS)


def _answer_of(prompt: Prompt) -> str:
    answer = prompt.extra["answer"]
    if not isinstance(answer, str) or not answer.strip():
        raise LVLMError(
            f"prompt {prompt.id}: answer is {repr(answer)[:60]}; expected a text; without this field, the model "
            "generates one"
        )
    return answer.strip()


def _dtype(model: LVLM) -> str:
    return str(model.params["language_model"]["embed_tokens"]["embedding"].dtype)
