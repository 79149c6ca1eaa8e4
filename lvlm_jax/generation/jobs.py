"""Answers a file of questions into a file of answers, in LLaVA's format; a killed job can be resumed.

The answers file is a `journal` log, and its record is `<answers file>.run.json`. Answers are appended in the order of
their questions and flushed to the disk batch by batch. A restarted job skips the questions that are already answered;
with other settings it stops with an error.

Prompts of similar size are batched together: questions are sorted within every `SORTED_BATCHES` batches, and an answer
is written after those of earlier questions. So a kill loses no more than these batches.
"""

import dataclasses
import json
import os
import pathlib
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any, NamedTuple

from lvlm_jax.errors import LVLMError
from lvlm_jax.generation.output import Output
from lvlm_jax.generation.questions import Question, conversation, length_class, read_questions
from lvlm_jax.journal import progress
from lvlm_jax.journal.log import AnswerLog, expect, seed_of
from lvlm_jax.journal.record import file_hash
from lvlm_jax.processors.images import in_folder, open_image

SORTED_BATCHES = 16  # number of batches within which questions are sorted


@dataclasses.dataclass(frozen=True)
class Answer:
    """A model's answer to one question."""

    text: str
    finish_reason: str
    tokens: int  # number of tokens generated, including the end token


class Request(NamedTuple):
    """A question as the model receives it."""

    line: int
    conversation: list[dict]
    seed: int


# Turns conversations, with one seed each, into one answer each.
Answerer = Callable[[list[list[dict]], list[int]], list[Answer]]
# Reads batches of requests as needed, and yields lists of (line number, answer or error).
Stream = Callable[[Iterator[list[Request]]], Iterator[list[tuple[int, Answer | LVLMError]]]]


@dataclasses.dataclass
class Summary:
    """Result of a job: questions answered earlier, answered now, and failed (line number and reason)."""

    before: int
    now: int
    failures: dict[int, str]


def _line_answered(entry: dict) -> tuple[int, None]:
    """The line number of the question that an entry of the answers file answers."""
    expect(entry["metadata"], {"line": int})
    return entry["metadata"]["line"], None


def _entry(question: Question, answer: Answer, model_id: str, method: dict | None) -> dict:
    return {
        "question_id": question.question_id,
        "prompt": question.text,
        "text": answer.text,
        "model_id": model_id,
        "image": question.image,
        "metadata": {
            "line": question.line,
            "method": method,
            "finish_reason": answer.finish_reason,
            "tokens": answer.tokens,
        },
    }


def answerer(model: Any, **options: Any) -> Answerer:
    """Makes an `Answerer` from an `LVLM`; `options` are options of the model's `generate`."""

    def answer(conversations: list[list[dict]], seeds: list[int]) -> list[Answer]:
        return _answers(model.generate(conversations, seed=seeds, **options))

    return answer


def streamer(model: Any, batch_size: int, **options: Any) -> Stream:
    """Makes a `Stream` of an `LVLM` by continuous batching; `options` are those of `generate_many`."""

    def stream(batches: Iterable[list[Request]]) -> Iterator[list[tuple[int, Answer | LVLMError]]]:
        lines = []

        def requests() -> Iterator[tuple[list[dict], int]]:
            for batch in batches:
                for line, messages, seed in batch:
                    lines.append(line)
                    yield messages, seed

        for number, out in model.generate_many(requests(), batch_size=batch_size, **options):
            yield [(lines[number], out if isinstance(out, LVLMError) else _answers(out)[0])]

    return stream


def _answers(out: Output) -> list[Answer]:
    triples = zip(out.text, out.finish_reason, out.tokens, strict=True)
    return [Answer(text, reason, len(tokens)) for text, reason, tokens in triples]


def in_batches(answer: Answerer) -> Stream:
    """A stream that answers batch after batch."""

    def stream(batches: Iterable[list[Request]]) -> Iterator[list[tuple[int, Answer | LVLMError]]]:
        for batch in batches:
            yield _answer_or_split(answer, batch)

    return stream


def _answer_or_split(answer: Answerer, batch: list[Request]) -> list[tuple[int, Answer | LVLMError]]:
    try:
        answers = answer([request.conversation for request in batch], [request.seed for request in batch])
    except LVLMError as error:
        if len(batch) == 1:
            return [(batch[0].line, error)]
        # Some request of the batch fails; run alone, each succeeds or fails by itself.
        return [pair for request in batch for pair in _answer_or_split(answer, [request])]
    return [(request.line, reply) for request, reply in zip(batch, answers, strict=True)]


def _batches(questions: list[Question], done: Container[int], size: int) -> Iterator[list[Question]]:
    """Batches of the remaining questions; those of similar size are together."""
    for start in range(0, len(questions), SORTED_BATCHES * size):
        remaining = [
            question for question in questions[start : start + SORTED_BATCHES * size] if question.line not in done
        ]
        remaining.sort(key=lambda question: (len(question.image_names), length_class(question.text)))
        yield from (remaining[first : first + size] for first in range(0, len(remaining), size))


def _seed(seed: int, question: Question) -> int:
    return seed_of(seed, json.dumps(question.question_id))


def _requests(
    batches: Iterable[list[Question]],
    folder: pathlib.Path,
    seed: int,
    fail: Callable[[int, str], None],
    system: str,
    allow_urls: bool,
) -> Iterator[list[Request]]:
    """The questions of each batch with their images opened; calls `fail(line, reason)` if an image cannot be opened."""
    for batch in batches:
        requests = []
        for question in batch:
            try:
                images = [open_image(in_folder(folder, name), allow_urls) for name in question.image_names]
                messages = conversation(images, question.text, system)
                requests.append(Request(question.line, messages, _seed(seed, question)))
            except LVLMError as error:
                fail(question.line, str(error))
        if requests:
            yield requests


def run_job(
    load: Callable[[], Answerer | Stream],
    question_file,
    answers_file,
    record: dict,
    image_folder=".",
    batch_size: int = 1,
    seed: int = 0,
    model_id: str = "",
    streams: bool = False,
    system: str = "",
    allow_urls: bool = False,
) -> Summary:
    """Answers every question of `question_file` that `answers_file` does not answer yet.

    `load` is called once, and only if a question remains; it returns a `Stream` if `streams` is true, else an
    `Answerer`. `record` contains everything else that determines an answer (the hash of the question file is added
    here). Images at `http` or `https` addresses are downloaded only if `allow_urls` is true. The random draws for a
    question depend on `seed` and its id, not on its line or on interruptions.

    A malformed line, a broken image or a prompt that is too long is reported on stderr with its line number, and the
    other questions are answered. Raises `LVLMError` if the whole job is impossible.
    """
    if batch_size < 1:
        raise LVLMError(f"batch size is {batch_size}; expected 1 or more")
    answers_path = pathlib.Path(answers_file)
    if not os.path.isdir(image_folder):
        raise LVLMError(f"image folder {str(image_folder)!r} is not a folder; check the path")
    questions, failures = read_questions(question_file)
    record = record | {"questions": file_hash(question_file), "seed": seed, "system": system}

    def fail(line: int, reason: str) -> None:
        failures[line] = reason
        progress.say(f"line {line} of {question_file}: {reason}")

    for line, reason in list(failures.items()):
        fail(line, reason)
    lines = {question.line for question in questions}
    record_file = answers_path.with_name(answers_path.name + ".run.json")
    with AnswerLog(answers_path, record, _line_answered, lines, record_file) as log:
        done = log.answers
        waiting = deque(question for question in questions if question.line not in done)
        summary = Summary(len(done), 0, failures)
        if not waiting:
            return summary
        stream = load() if streams else in_batches(load())
        batches = _batches(questions, done, batch_size)
        requests = _requests(batches, pathlib.Path(image_folder), seed, fail, system, allow_urls)
        finished: dict[int, Answer] = {}
        with progress.Progress(len(questions), len(done), "answers") as bar:

            def write() -> None:
                ready = []
                while waiting and (waiting[0].line in finished or waiting[0].line in failures):
                    question = waiting.popleft()
                    bar.update()
                    if question.line in finished:
                        ready.append((question, finished.pop(question.line)))
                log.append(_entry(*pair, model_id, record.get("method")) for pair in ready)
                summary.now += len(ready)

            for answers in stream(requests):
                for line, answer in answers:
                    if isinstance(answer, LVLMError):
                        fail(line, str(answer))
                    else:
                        finished[line] = answer
                write()
            write()  # the last questions may have failed
    return summary
