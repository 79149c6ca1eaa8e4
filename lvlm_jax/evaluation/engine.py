"""Asks a model the questions of a benchmark: in batches of alike prompts, with a log that survives a kill.

What is asked together depends on the questions, the batch size and the number of processes alone, never on what a log
holds already: a batch whose answers are not all there is asked again whole, so that a run that was killed ends with the
very answers of one that was not. Prompts about one picture follow each other, and its picture is encoded once where
the model allows it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lvlm_jax.evaluation.pictures import Pictures
from lvlm_jax.evaluation.protocol import Protocol
from lvlm_jax.evaluation.question import Question
from lvlm_jax.evaluation.shares import ALONE, Key, Share, read
from lvlm_jax.generation.answer_log import AnswerLog, seed_of
from lvlm_jax.generation.questions import conversation
from lvlm_jax.methods import Method

SHORTEST = 64  # characters: prompts up to here, and from here to twice as many and so on, go together

# From conversations, with a random seed for each, to what is kept of their answers; plain JSON values.
Respond = Callable[[list[list[dict]], list[int]], list[dict]]


@dataclasses.dataclass(frozen=True)
class Said:
    """An answer: its text, how many tokens it has, and whether it ended by itself."""

    text: str
    tokens: int
    ended: bool


@dataclasses.dataclass(frozen=True)
class Work:
    """How questions are put to a model, whatever is asked of it.

    Attributes:
        batch_size: prompts at once.
        seed: of sampling; every question has a random stream of its own, whatever its batch.
        folder: where answers are kept as they come, and read from on the next start; None for nowhere.
        record: what decides the answers; the first line of every log, required with a folder.
        share: the part of the questions that this process answers.
    """

    batch_size: int = 16
    seed: int = 0
    folder: Path | None = None
    record: Mapping = dataclasses.field(default_factory=dict)
    share: Share = ALONE


DEFAULT = Work()


def ask(
    model: Any,
    questions: Sequence[Question],
    protocol: Protocol,
    method: Method | None = None,
    work: Work = DEFAULT,
    title: str = "questions",
) -> dict[Key, Said]:
    """Answers to questions, by `Question.key`.

    Args:
        model: an `LVLM`.
        questions: from a benchmark's `read(..., need_images=True)`.
        protocol: prompt, length and decoding.
        title: of the progress bar.

    Returns:
        Those that are known now: all with one process, with several those of the shares done so far.

    Raises:
        LVLMError: an unreadable picture, or a log of another run.
    """

    def respond(messages: list[list[dict]], seeds: list[int]) -> list[dict]:
        output = model.generate(
            messages,
            method=method,
            max_new_tokens=protocol.max_new_tokens,
            temperature=protocol.temperature,
            top_p=protocol.top_p,
            seed=seeds,
        )
        said = zip(output.text, output.tokens, output.finish_reason, strict=True)
        return [
            {"text": text.strip(), "tokens": len(tokens), "ended": reason == "stop"}
            for text, tokens, reason in said
        ]

    found = collect(model, questions, protocol, respond, work, "log", title)
    return {key: Said(row["text"], row["tokens"], row["ended"]) for key, row in found.items()}


def collect(
    model: Any,
    questions: Sequence[Question],
    protocol: Protocol,
    respond: Respond,
    work: Work,
    name: str,
    title: str,
) -> dict[Key, dict]:
    """What `respond` says to questions, by `Question.key`; `ask` and the controls are made of this.

    Args:
        respond: the last batch is filled up with copies, whose answers are dropped.
        name: of the logs.
    """
    batches = plan(questions, protocol, work.batch_size, work.share)
    ours = [questions[index] for batch in batches for prompt in batch for index in prompt]
    with contextlib.ExitStack() as stack:
        known: dict[Key, dict] = {}
        log = None
        if work.folder is not None:
            log = stack.enter_context(AnswerLog(work.share.path(work.folder, name), work.record))
            known = read(work.folder, name, work.record).answers
        needed = [image for batch in batches for prompt in batch for image in questions[prompt[0]].images]
        pictures = stack.enter_context(Pictures(model, needed, work.batch_size))
        done = sum(question.key in known for question in ours)
        bar = stack.enter_context(tqdm(total=len(ours), initial=done, desc=title, mininterval=2))
        for batch in batches:
            if all(questions[index].key in known for prompt in batch for index in prompt):
                continue
            began = time.monotonic()
            first = [questions[prompt[0]] for prompt in batch]
            messages = [conversation(pictures.ready(one.images), protocol.prompt(one)) for one in first]
            seeds = [seed_of(work.seed, "/".join(one.key)) for one in first]
            spare = len(batches[0]) - len(batch)  # the last batch has the shape of the others
            rows = respond(messages + messages[-1:] * spare, seeds + seeds[-1:] * spare)
            fresh = {
                questions[index].key: row
                for prompt, row in zip(batch, rows, strict=False)
                for index in prompt
                if questions[index].key not in known
            }
            if log is not None:
                cost = {
                    "prompts": len(batch),
                    "tokens": sum(row.get("tokens", 1) for row in rows[: len(batch)]),
                }
                log.append(
                    [{"group": group, "id": number} | row for (group, number), row in fresh.items()]
                    + [{"batch": cost | {"seconds": round(time.monotonic() - began, 4)}}]
                )
            known |= fresh
            bar.update(len(fresh))
    return {question.key: known[question.key] for question in questions if question.key in known}


def plan(
    questions: Sequence[Question],
    protocol: Protocol,
    batch_size: int,
    share: Share = ALONE,
) -> list[list[list[int]]]:
    """Batches of prompts, a prompt being the numbers of the questions that it answers.

    Questions that are the same text about the same pictures (POPE's splits share half of theirs) are one prompt, unless
    answers are drawn. Prompts of one batch have about the same length, so that few programs are compiled, and within
    a length those about one picture follow each other. A process takes every n-th picture (with all its prompts), so
    that none is encoded twice; prompts without a picture are dealt out one by one.
    """
    prompts: dict[tuple, list[int]] = {}
    for index, question in enumerate(questions):
        same = (question.images, protocol.prompt(question), index if protocol.temperature else 0)
        prompts.setdefault(same, []).append(index)
    place: dict[Any, int] = {}
    for same in prompts:
        place.setdefault(same[0] or same, len(place))
    ours = [same for same in prompts if place[same[0] or same] % share.processes == share.index]
    ours.sort(key=lambda same: (len(same[0]), _length_class(same[1]), place[same[0] or same], len(same[1])))
    listed = [prompts[same] for same in ours]
    return [listed[start : start + batch_size] for start in range(0, len(listed), batch_size)]


def _length_class(text: str) -> int:
    return max(0, (len(text) - 1) // SHORTEST).bit_length()
