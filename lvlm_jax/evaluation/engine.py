"""Asks a model the questions of a benchmark, in batches of similar prompts, with a log that survives a kill.

Batches depend only on the questions, the batch size and the number of processes, never on the content of a log. A batch
with a missing answer is asked again as a whole, so that a run that was killed ends with exactly the answers of an
uninterrupted run. Prompts about one image follow each other, and the image is encoded once if the model allows it.
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
from lvlm_jax.journal.place import commit, machine
from lvlm_jax.journal.progress import Progress
from lvlm_jax.methods import Method

Prompt = list[int]  # the numbers of the questions that one prompt asks
# Maps conversations, with one random seed and the question of each, to plain JSON values, which are logged.
Respond = Callable[[list[list[dict]], list[int], list[Question]], list[dict]]
# Maps batches of prompts, the size of a full batch, and a function that makes a request of a prompt, to an iterator
# over groups of prompts with their logged values.
Rounds = Callable[[list[list[Prompt]], int, Callable[[Prompt], Request]], Iterator[list[tuple[Prompt, dict]]]]


@dataclasses.dataclass(frozen=True)
class ModelAnswer:
    """An answer: its text, its number of tokens, and whether it ended by itself."""

    text: str
    tokens: int
    ended: bool


@dataclasses.dataclass(frozen=True)
class Work:
    """How questions are put to a model.

    Attributes:
        batch_size: number of prompts that are answered together.
        seed: seed of sampling; every question has its own random stream, whatever its batch.
        folder: folder of the log of answers, from which the next start resumes; None for no log.
        record: everything that determines the answers; the first line of every log, required with a folder.
        share: the part of the questions that this process answers.
        schedule: "batches", "continuous" (when an answer ends, the next prompt starts), or "auto": continuous if
            answers may be long and the method allows it.
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
) -> dict[Key, ModelAnswer]:
    """Answers questions; returns the answers by `Question.key`.

    Args:
        model: an `LVLM`.
        questions: from a benchmark's `read(..., need_images=True)`.
        protocol: prompt, length and decoding.
        title: title of the progress bar.

    Returns:
        The answers so far: all of them with one process; with several, those of finished shares.

    Raises:
        LVLMError: an image is unreadable, or the log belongs to another run.
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
        rounds = _in_batches(
            lambda messages, seeds, _: _rows(model.generate(messages, seed=seeds, **settings)), questions
        )
    plain_tower = method is None or method.tower_edit() is None
    rows = _collect(model, questions, protocol, rounds, work, "log", title, encode=plain_tower)
    return {key: ModelAnswer(row["text"], row["tokens"], row["ended"]) for key, row in rows.items()}


def _rows(output: Output) -> list[dict]:
    replies = zip(output.text, output.tokens, output.finish_reason, strict=True)
    return [
        {"text": text.strip(), "tokens": len(tokens), "ended": reason == "stop"} for text, tokens, reason in replies
    ]


def collect(
    model: Any, questions: Sequence[Question], protocol: Protocol, respond: Respond, work: Work, name: str, title: str
) -> dict[Key, dict]:
    """The values that `respond` returns for batches of questions, by `Question.key`.

    Args:
        respond: answers one batch; the last batch is padded with copies, whose answers are dropped.
        name: name of the logs.
    """
    return _collect(model, questions, protocol, _in_batches(respond, questions), work, name, title)


def _in_batches(respond: Respond, questions: Sequence[Question]) -> Rounds:
    def rounds(
        batches: list[list[Prompt]], size: int, request: Callable[[Prompt], Request]
    ) -> Iterator[list[tuple[Prompt, dict]]]:
        for batch in batches:
            messages, seeds = map(list, zip(*map(request, batch), strict=True))
            first_questions = [questions[prompt[0]] for prompt in batch]
            spare = size - len(batch)  # the last batch is padded to the shape of the others
            rows = respond(*(values + values[-1:] * spare for values in (messages, seeds, first_questions)))
            yield list(zip(batch, rows, strict=False))

    return rounds


def _continuously(answer: Callable[[Iterator[Request]], Iterator[tuple[int, Output | LVLMError]]]) -> Rounds:
    def rounds(
        batches: list[list[Prompt]], size: int, request: Callable[[Prompt], Request]
    ) -> Iterator[list[tuple[Prompt, dict]]]:
        prompts = [prompt for batch in batches for prompt in batch]
        results = []
        for number, output in answer(map(request, prompts)):
            if isinstance(output, LVLMError):
                raise output
            results.append((prompts[number], *_rows(output)))
            if len(results) == size:
                yield results
                results = []
        if results:
            yield results

    return rounds


def _collect(
    model: Any,
    questions: Sequence[Question],
    protocol: Protocol,
    rounds: Rounds,
    work: Work,
    name: str,
    title: str,
    encode: bool = True,
) -> dict[Key, dict]:
    """Values of `rounds` for all questions, by `Question.key`; each value is logged at once, and is not computed twice.

    Args:
        encode: whether images may go through the plain tower once for all questions about them.
    """
    batches = plan(questions, protocol, work.batch_size, work.share)
    ours = [questions[index] for batch in batches for prompt in batch for index in prompt]
    with contextlib.ExitStack() as stack:
        finished: dict[Key, dict] = {}
        log = None
        if work.folder is not None:
            if work.share.writes:
                path = work.share.path(work.folder, name)
                log = stack.enter_context(AnswerLog(path, work.record, lambda entry: None))
            work.share.meet()  # after this, the log exists
            finished = shares.read(work.folder, name, work.record, questions).answers
            work.share.meet()  # after this, all processes have read the same log, before anybody appends
        images = [image for batch in batches for prompt in batch for image in questions[prompt[0]].images]
        pictures = stack.enter_context(Pictures(model, images, work.batch_size, encode=encode))
        num_done = sum(question.key in finished for question in ours)
        quiet = not work.share.writes
        progress = stack.enter_context(Progress(len(ours), num_done, title, quiet))
        waiting = [
            batch
            for batch in batches
            if not all(questions[index].key in finished for prompt in batch for index in prompt)
        ]

        def request(prompt: Prompt) -> Request:
            first = questions[prompt[0]]
            messages = conversation(pictures.ready(first.images), protocol.prompt(first), protocol.system)
            return messages, seed_of(work.seed, "/".join(first.key))

        began = time.monotonic()
        for results in rounds(waiting, max(map(len, batches), default=0), request):
            fresh = {
                questions[index].key: row
                for prompt, row in results
                for index in prompt
                if questions[index].key not in finished
            }
            if log is not None:
                cost = {
                    "prompts": len(results),
                    "tokens": sum(row.get("tokens", 1) for _, row in results),
                    "seconds": round(time.monotonic() - began, 4),
                    "commit": commit(),
                    "machine": machine(),
                }
                log.append(
                    [{"group": group, "id": number} | row for (group, number), row in fresh.items()] + [{"batch": cost}]
                )
            began = time.monotonic()
            finished |= fresh
            progress.update(len(fresh))
    return {question.key: finished[question.key] for question in questions if question.key in finished}


def plan(
    questions: Sequence[Question], protocol: Protocol, batch_size: int, share: Share = ALONE
) -> list[list[Prompt]]:
    """Batches of prompts; a prompt is a list of the numbers of the questions that it asks.

    Questions with the same text about the same images (POPE's splits share half of theirs) are one prompt, unless
    answers are sampled. Prompts of one batch have similar length, so that few programs are compiled, and among those of
    equal length, prompts about one image follow each other. A process takes every n-th image with all its prompts, so
    that no image is encoded twice; prompts without an image are distributed one by one.
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
    listed_prompts = [prompts[same] for same in ours]
    return [listed_prompts[start : start + batch_size] for start in range(0, len(listed_prompts), batch_size)]
