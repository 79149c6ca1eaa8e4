"""What flow alignment learns on: conversations, the answers of which are given or generated under the teacher's edit.

Answers only say which rows the teacher and the student are compared in, so a model's own are as good as any, and the
edited model's are those that it will meet once it is trained.
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
ROOM_STEP = 16  # room for answers comes in multiples of this many tokens: every other room compiles another program


@dataclasses.dataclass(frozen=True)
class Staged:
    """Batches with the stage of each sample, `stage` Int[B]; picklable.

    Attributes:
        batches: the batches.
        stage: one of STAGES; "both" is stage 1 for the first half of the steps and stage 2 for the second.
        total: how many steps there will be.
    """

    batches: Batches
    stage: str
    total: int

    def __call__(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        batch = self.batches(step)
        return batch | {"stage": np.full(batch["weight"].shape, self.at(step), np.int32)}

    def at(self, step: int) -> int:
        """The stage of a step."""
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
    """The conversations of a file, with an answer each.

    Args:
        path: a file of conversations or of preference pairs, whose chosen answers count, as `read_conversations` takes
            them; or of prompts as `read_prompts` takes them, with the text of an answer in the field `answer` or
            without. Answers that are missing are generated greedily, once: they are logged in `folder`.
        model, method: what generates them.
        longest: tokens of the longest prompt with its answer.
        batch_size: prompts at a time.
        folder: of the logs; a log's name is a hash of everything that decides the answers.

    Raises:
        LVLMError: a file that cannot be used, a prompt that leaves no room for an answer, or answers to generate in
            several processes.
    """
    if not _asks(path):
        return pair_files.read_conversations(path)
    prompts = read_prompts(path)
    answers = {prompt.id: _given(prompt) for prompt in prompts if "answer" in prompt.extra}
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
        record: what decides the answers, as JSON values; begins the log.
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
        # Alike prompts go together, so that little of a batch is padding and few programs are compiled.
        waiting.sort(key=lambda prompt: (len(prompt.images), len(prompt.text)))
        with Progress(len(prompts), len(known), "answers") as progress:
            for start in range(0, len(waiting), batch_size):
                batch = waiting[start : start + batch_size]
                filled = [*batch, *[batch[-1]] * (batch_size - len(batch))]  # the last batch keeps its shape
                prepared = model.prepare([prompt.conversation() for prompt in filled])
                room = longest - multiple_of(ROOM_STEP, int(prepared.lengths.max()))
                if room < 1:
                    raise LVLMError(
                        f"a prompt like {batch[-1].id} has {prepared.lengths.max()} tokens, which leaves no room for "
                        f"an answer in a row of {longest}; set a larger length, or shorten the prompt"
                    )
                texts = model.generate(prepared, method=method, max_new_tokens=room).text
                fresh = {prompt.id: text for prompt, text in zip(batch, texts, strict=False)}
                answers.append({"id": name, "answer": text} for name, text in fresh.items())
                known |= fresh
                progress.update(len(batch))
    return known


def _asks(path: str | Path) -> bool:
    """Whether a file holds prompts, and not preference pairs or whole conversations."""
    if dataset_info.FILE in str(path):
        return False
    _, _, row = next(pair_files.read_rows(files.expand(path), "conversation file"))
    return "prompt" in row and not row.keys() & set(ANSWERS)


def _given(prompt: Prompt) -> str:
    answer = prompt.extra["answer"]
    if not isinstance(answer, str) or not answer.strip():
        raise LVLMError(
            f"prompt {prompt.id}: answer is {repr(answer)[:60]}; expected a text, or no such field to have one made"
        )
    return answer.strip()


def _dtype(model: LVLM) -> str:
    return str(model.params["language_model"]["embed_tokens"]["embedding"].dtype)
