"""A file of questions to a file of answers, in LLaVA's format, that survives being killed.

The answers file is a `journal` log, with its record in `<answers file>.run.json`. It only ever grows, by answers that
stand in the order of their questions, each on the disk before what comes of a later batch. Started again, a job passes
over the questions already answered, and goes on; with other settings it refuses.

Prompts of about one size go together: within every `WINDOW` batches questions are sorted, and an answer waits for
those of earlier questions. So a kill costs no more than these.
"""

import dataclasses
import json
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
from lvlm_jax.processors.images import open_image, within

WINDOW = 16  # batches within which questions are sorted


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model said to one question."""

    text: str
    finish_reason: str
    tokens: int  # number of tokens generated, the end token included


class Request(NamedTuple):
    """A question as it is put to a model."""

    line: int
    conversation: list[dict]
    seed: int


# From conversations and one seed for each, to one answer for each.
Answerer = Callable[[list[list[dict]], list[int]], list[Answer]]
# From batches of requests, drawn when they are needed, to answers (or what is wrong) by line, some at a time.
Stream = Callable[[Iterator[list[Request]]], Iterator[list[tuple[int, Answer | LVLMError]]]]


@dataclasses.dataclass
class Summary:
    """How a job went: questions answered earlier, answered now, and failed (by line number, with the reason)."""

    before: int
    now: int
    failures: dict[int, str]


def _line_answered(entry: dict) -> tuple[int, None]:
    """The number of the line that an entry of the answers file answers."""
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
    """An `LVLM` that answers a batch at once; `options` are those of its `generate`."""

    def answer(conversations: list[list[dict]], seeds: list[int]) -> list[Answer]:
        return _answers(model.generate(conversations, seed=seeds, **options))

    return answer


def streamer(model: Any, batch_size: int, **options: Any) -> Stream:
    """An `LVLM` where an answer that ends makes room for the next question; `options` are those of `generate_many`."""

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
            yield _answered(answer, batch)

    return stream


def _answered(answer: Answerer, batch: list[Request]) -> list[tuple[int, Answer | LVLMError]]:
    try:
        answers = answer([one.conversation for one in batch], [one.seed for one in batch])
    except LVLMError as error:
        if len(batch) == 1:
            return [(batch[0].line, error)]
        # One of them does not fit; asked alone, each fails or succeeds for itself.
        return [pair for one in batch for pair in _answered(answer, [one])]
    return [(one.line, said) for one, said in zip(batch, answers, strict=True)]


def _batches(questions: list[Question], done: Container[int], size: int) -> Iterator[list[Question]]:
    """Batches of questions that are not done, those of about one size together."""
    for start in range(0, len(questions), WINDOW * size):
        window = [one for one in questions[start : start + WINDOW * size] if one.line not in done]
        window.sort(key=lambda one: (len(one.image_names), length_class(one.text)))
        yield from (window[first : first + size] for first in range(0, len(window), size))


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
    """The questions of each batch with their pictures opened; `fail(line, reason)` for those that cannot be."""
    for batch in batches:
        ready = []
        for question in batch:
            try:
                images = [open_image(within(folder, name), allow_urls) for name in question.image_names]
                asked = conversation(images, question.text, system)
                ready.append(Request(question.line, asked, _seed(seed, question)))
            except LVLMError as error:
                fail(question.line, str(error))
        if ready:
            yield ready


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
    """Answer every question of `question_file` that `answers_file` does not answer yet.

    `load` is called once, and only when something is left to do; with `streams` it gives a `Stream`, else an
    `Answerer`. `record` holds everything else that decides an answer (the hash of the question file is added here).
    Images that are `http` or `https` addresses are downloaded if `allow_urls` says so.
    What a question draws depends on `seed` and its id, not on its line or on where a run was interrupted.

    A line that is no question, a broken picture, a prompt that does not fit: each is reported on stderr with its line
    number, the others are answered. Raises `LVLMError` when the job as a whole cannot be done.
    """
    if batch_size < 1:
        raise LVLMError(f"batch size is {batch_size}; expected 1 or more")
    answers_path = pathlib.Path(answers_file)
    if not pathlib.Path(image_folder).is_dir():
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
        known: dict[int, Answer] = {}
        with progress.Progress(len(questions), len(done), "answers") as shown:

            def write() -> None:
                ready = []
                while waiting and (waiting[0].line in known or waiting[0].line in failures):
                    question = waiting.popleft()
                    shown.update()
                    if question.line in known:
                        ready.append((question, known.pop(question.line)))
                log.append(_entry(*pair, model_id, record.get("method")) for pair in ready)
                summary.now += len(ready)

            for answers in stream(requests):
                for line, answer in answers:
                    if isinstance(answer, LVLMError):
                        fail(line, str(answer))
                    else:
                        known[line] = answer
                write()
            write()  # the last questions may have failed
    return summary
