"""Asks a model the questions of a benchmark: in batches of alike prompts, with a log that survives a kill.

The log is JSON lines. The first says what is being answered by whom; a run that finds another record there stops
before it mixes two. Every batch is appended and flushed whole, and a line that a kill has cut is dropped on the next
start, so no answer is lost that a log shows and none is there twice.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation.protocol import Protocol
from lvlm_jax.evaluation.question import Question
from lvlm_jax.generation.images import open_image
from lvlm_jax.generation.questions import conversation
from lvlm_jax.generation.record import differences
from lvlm_jax.methods import Method

READERS = 4  # threads that open pictures of the next batches


@dataclasses.dataclass(frozen=True)
class Said:
    """An answer: its text, how many tokens it has, and whether it ended by itself."""

    text: str
    tokens: int
    ended: bool


def ask(
    model: Any,
    questions: Sequence[Question],
    protocol: Protocol,
    method: Method | None = None,
    *,
    batch_size: int = 16,
    seed: int = 0,
    log: Path | None = None,
    record: Mapping | None = None,
    title: str = "questions",
) -> dict[tuple[str, str], Said]:
    """Answers to questions, by `Question.key`.

    Questions that are the same text about the same pictures (POPE's splits share half of theirs) are put once under
    greedy decoding. When sampling, each question has a random stream of its own, whatever its batch.

    Args:
        model: an `LVLM`.
        questions: from a benchmark's `read(..., need_images=True)`.
        protocol: prompt, length and decoding.
        log: where answers are kept as they come, and read from on the next start.
        record: what the log's first line says; required with a log.

    Raises:
        LVLMError: an unreadable picture, or a log of another run.
    """
    known = {} if log is None else _opened(log, dict(record or {}))
    by_prompt: dict[tuple, list[int]] = {}
    for index, question in enumerate(questions):
        same = (question.images, protocol.prompt(question), index if protocol.temperature else 0)
        by_prompt.setdefault(same, []).append(index)
    groups = [same for same in by_prompt.values() if any(questions[index].key not in known for index in same)]
    # Alike prompts go together, so that little of a batch is padding and few programs are compiled.
    groups.sort(key=lambda same: _size(questions[same[0]], protocol))
    batches = [groups[start : start + batch_size] for start in range(0, len(groups), batch_size)]
    with tqdm(total=len(questions), initial=len(known), desc=title, mininterval=2) as bar:
        for batch, messages in _read_ahead(batches, questions, protocol):
            filled = messages + [messages[-1]] * (
                batch_size - len(messages)
            )  # the last batch keeps its shape
            seeds = [_seed(seed, questions[same[0]]) for same in batch]
            output = model.generate(
                filled,
                method=method,
                max_new_tokens=protocol.max_new_tokens,
                temperature=protocol.temperature,
                top_p=protocol.top_p,
                seed=seeds + [seed] * (batch_size - len(seeds)),
            )
            fresh = {}
            for row, same in enumerate(batch):
                said = Said(
                    output.text[row].strip(), len(output.tokens[row]), output.finish_reason[row] == "stop"
                )
                fresh |= {questions[index].key: said for index in same}
            if log is not None:
                _append(log, {key: said for key, said in fresh.items() if key not in known})
            known |= fresh
            bar.update(sum(map(len, batch)))
    return {question.key: known[question.key] for question in questions}


def _seed(seed: int, question: Question) -> int:
    """A seed that depends on the question, not on its place."""
    digits = np.random.SeedSequence([seed, *"/".join(question.key).encode()]).generate_state(1)
    return int(digits[0] >> 1)


def _size(question: Question, protocol: Protocol) -> tuple[int, int]:
    return len(question.images), len(protocol.prompt(question))


def _read_ahead(
    batches: list[list[list[int]]], questions: Sequence[Question], protocol: Protocol
) -> Iterator[tuple[list[list[int]], list]]:
    """Batches with their conversations, pictures of the next ones being opened meanwhile."""

    def messages(same: list[int]) -> list[dict]:
        question = questions[same[0]]
        images = [
            Image.open(io.BytesIO(image)) if isinstance(image, bytes) else open_image(image)
            for image in question.images
        ]
        return conversation(images, protocol.prompt(question))

    with ThreadPoolExecutor(READERS) as pool:
        coming = [[pool.submit(messages, same) for same in batch] for batch in batches[:2]]
        for index, batch in enumerate(batches):
            if index + 2 < len(batches):
                coming.append([pool.submit(messages, same) for same in batches[index + 2]])
            yield batch, [future.result() for future in coming[index]]
            coming[index] = []


def _opened(log: Path, record: dict) -> dict[tuple[str, str], Said]:
    """What a log holds, its unfinished last line cut off; a new one is begun with the record."""
    record = json.loads(json.dumps(record))
    if not log.exists():
        log.parent.mkdir(parents=True, exist_ok=True)
        part = log.with_name(f"{log.name}.part")
        part.write_text(json.dumps({"record": record}) + "\n", encoding="utf-8")
        part.replace(log)
        return {}
    content = log.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with log.open("r+b") as file:
            file.truncate(len(whole))
    lines = whole.decode("utf-8").splitlines()
    try:
        entries = [json.loads(line) for line in lines]
        found = entries[0]["record"]
        said = {
            (entry["group"], entry["id"]): Said(entry["text"], entry["tokens"], entry["ended"])
            for entry in entries[1:]
        }
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise LVLMError(f"{log} is no log of answers; give another --out, or remove it") from error
    if found != record:
        raise LVLMError(
            f"{log} was begun with other settings ({'; '.join(differences(found, record)[:3])}); "
            "give another --out, or remove it to start again"
        )
    return said


def _append(log: Path, said: Mapping[tuple[str, str], Said]) -> None:
    lines = (
        json.dumps({"group": group, "id": number} | dataclasses.asdict(one), ensure_ascii=False)
        for (group, number), one in said.items()
    )
    with log.open("ab") as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())
