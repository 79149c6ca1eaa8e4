"""Asks a model the questions of a benchmark: alike prompts together, with a log that survives a kill.

What is asked together depends on the questions, the batch size and the number of processes alone, never on what a log
holds already: a batch whose answers are not all there is asked again whole, so that a run that was killed ends with the
very answers of one that was not. Prompts about one picture follow each other, and its picture is encoded once where
the model allows it.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import shares
from lvlm_jax.evaluation.pictures import Pictures
from lvlm_jax.evaluation.protocol import Protocol
from lvlm_jax.evaluation.question import Question
from lvlm_jax.evaluation.shares import ALONE, Key, Share
from lvlm_jax.generation import scheduler
from lvlm_jax.generation.output import Output
from lvlm_jax.generation.questions import conversation, length_class
from lvlm_jax.generation.scheduler import Request
from lvlm_jax.journal.log import AnswerLog, seed_of
from lvlm_jax.journal.progress import Progress
from lvlm_jax.methods import Method

Prompt = list[int]  # by the numbers of the questions that it answers
# From conversations, with a random seed for each, to what is kept of their answers; plain JSON values.
Respond = Callable[[list[list[dict]], list[int]], list[dict]]
# From batches of prompts, the size of a whole one, and what makes a request of a prompt, to prompts with what is kept
# of their answers, some at a time.
Rounds = Callable[[list[list[Prompt]], int, Callable[[Prompt], Request]], Iterator[list[tuple[Prompt, dict]]]]


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
        schedule: "batches", "continuous" (an answer that ends makes room for the next prompt), or "auto":
            continuous where answers may be long and the method allows it.
    """

    batch_size: int = 16
    seed: int = 0
    folder: Path | None = None
    record: Mapping = dataclasses.field(default_factory=dict)
    share: Share = ALONE
    schedule: str = "auto"


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
    settings = {
        "method": method,
        "max_new_tokens": protocol.max_new_tokens,
        "temperature": protocol.temperature,
        "top_p": protocol.top_p,
    }
    if scheduler.use_continuous(work.schedule, method, model.mesh, protocol.max_new_tokens, work.batch_size):
        rounds = _continuously(lambda requests: model.generate_many(requests, batch_size=work.batch_size, **settings))
    else:
        rounds = _in_batches(lambda messages, seeds: _kept(model.generate(messages, seed=seeds, **settings)))
    found = _collect(model, questions, protocol, rounds, work, "log", title)
    return {key: Said(row["text"], row["tokens"], row["ended"]) for key, row in found.items()}


def _kept(output: Output) -> list[dict]:
    said = zip(output.text, output.tokens, output.finish_reason, strict=True)
    return [{"text": text.strip(), "tokens": len(tokens), "ended": reason == "stop"} for text, tokens, reason in said]


def collect(
    model: Any, questions: Sequence[Question], protocol: Protocol, respond: Respond, work: Work, name: str, title: str
) -> dict[Key, dict]:
    """What `respond` says to batches of questions, by `Question.key`.

    Args:
        respond: the last batch is filled up with copies, whose answers are dropped.
        name: of the logs.
    """
    return _collect(model, questions, protocol, _in_batches(respond), work, name, title)


def _in_batches(respond: Respond) -> Rounds:
    def rounds(
        batches: list[list[Prompt]], size: int, request: Callable[[Prompt], Request]
    ) -> Iterator[list[tuple[Prompt, dict]]]:
        for batch in batches:
            messages, seeds = map(list, zip(*map(request, batch), strict=True))
            spare = size - len(batch)  # the last batch has the shape of the others
            rows = respond(messages + messages[-1:] * spare, seeds + seeds[-1:] * spare)
            yield list(zip(batch, rows, strict=False))

    return rounds


def _continuously(answer: Callable[[Iterator[Request]], Iterator[tuple[int, Output | LVLMError]]]) -> Rounds:
    def rounds(
        batches: list[list[Prompt]], size: int, request: Callable[[Prompt], Request]
    ) -> Iterator[list[tuple[Prompt, dict]]]:
        prompts = [prompt for batch in batches for prompt in batch]
        answered = []
        for number, output in answer(map(request, prompts)):
            if isinstance(output, LVLMError):
                raise output
            answered.append((prompts[number], *_kept(output)))
            if len(answered) == size:
                yield answered
                answered = []
        if answered:
            yield answered

    return rounds


def _collect(
    model: Any, questions: Sequence[Question], protocol: Protocol, rounds: Rounds, work: Work, name: str, title: str
) -> dict[Key, dict]:
    """What `rounds` gives for all questions, by `Question.key`: logged as it comes, known answers passed over."""
    batches = plan(questions, protocol, work.batch_size, work.share)
    ours = [questions[index] for batch in batches for prompt in batch for index in prompt]
    with contextlib.ExitStack() as stack:
        known: dict[Key, dict] = {}
        log = None
        if work.folder is not None:
            if work.share.writes:
                path = work.share.path(work.folder, name)
                log = stack.enter_context(AnswerLog(path, work.record, lambda entry: None))
            work.share.meet()  # the log is there
            known = shares.read(work.folder, name, work.record, questions).answers
            work.share.meet()  # all have read the same, for nobody has appended
        needed = [image for batch in batches for prompt in batch for image in questions[prompt[0]].images]
        pictures = stack.enter_context(Pictures(model, needed, work.batch_size))
        done = sum(question.key in known for question in ours)
        quiet = not work.share.writes
        progress = stack.enter_context(Progress(len(ours), done, title, quiet))
        waiting = [
            batch for batch in batches if not all(questions[index].key in known for prompt in batch for index in prompt)
        ]

        def request(prompt: Prompt) -> Request:
            first = questions[prompt[0]]
            messages = conversation(pictures.ready(first.images), protocol.prompt(first), protocol.system)
            return messages, seed_of(work.seed, "/".join(first.key))

        began = time.monotonic()
        for answered in rounds(waiting, max(map(len, batches), default=0), request):
            fresh = {
                questions[index].key: row
                for prompt, row in answered
                for index in prompt
                if questions[index].key not in known
            }
            if log is not None:
                cost = {
                    "prompts": len(answered),
                    "tokens": sum(row.get("tokens", 1) for _, row in answered),
                    "seconds": round(time.monotonic() - began, 4),
                }
                log.append(
                    [{"group": group, "id": number} | row for (group, number), row in fresh.items()] + [{"batch": cost}]
                )
            began = time.monotonic()
            known |= fresh
            progress.update(len(fresh))
    return {question.key: known[question.key] for question in questions if question.key in known}


def plan(
    questions: Sequence[Question], protocol: Protocol, batch_size: int, share: Share = ALONE
) -> list[list[Prompt]]:
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
    ours.sort(key=lambda same: (len(same[0]), length_class(same[1]), place[same[0] or same], len(same[1])))
    listed = [prompts[same] for same in ours]
    return [listed[start : start + batch_size] for start in range(0, len(listed), batch_size)]
