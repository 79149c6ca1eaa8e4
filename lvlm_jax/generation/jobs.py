"""A file of questions to a file of answers, in LLaVA's format, that survives being killed.

The answers file only ever grows, by answers that stand in the order of their questions, each on the disk before what
comes of a later batch. Beside it lies `<answers file>.run.json`, the record of everything that decides an answer.
Started again, a job drops a last line that was cut short, passes over the questions already answered, and goes on; with
other settings it refuses.

Prompts of about one size go together: within every `WINDOW` batches questions are sorted, and an answer waits for
those of earlier questions. So a kill costs no more than these.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from tqdm import tqdm

from lvlm_jax.errors import LVLMError
from lvlm_jax.generation.questions import Question, conversation, length_class, read_questions
from lvlm_jax.journal.record import differences, file_hash
from lvlm_jax.processors.images import open_image

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


def _write_new(path: pathlib.Path, text: str) -> None:
    """Write a file so that it is either complete or absent, whatever happens meanwhile."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _check_record(answers_path: pathlib.Path, record: dict, begun: bool) -> None:
    """Store `record` beside a new answers file, or compare it with the one stored when the file was begun."""
    path = answers_path.with_name(answers_path.name + ".run.json")
    if not begun:
        _write_new(path, json.dumps(record, indent=1, sort_keys=True) + "\n")
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LVLMError(
            f"answers file {str(answers_path)!r} is not empty and lies there without {path.name!r}, the record of the "
            "run that wrote it; choose another answers file"
        ) from error
    # Through JSON once, so that both sides hold the same kinds of values.
    changed = differences(stored, json.loads(json.dumps(record)))
    if changed:
        raise LVLMError(
            f"answers file {str(answers_path)!r} was begun with other settings ({'; '.join(changed)}); "
            "repeat those, or choose another answers file"
        )


def _answered_lines(file, content: bytes, path: pathlib.Path) -> set[int]:
    """Line numbers answered so far, after dropping a last line that was cut short."""
    done = set()
    position = 0
    for number, raw in enumerate(content.splitlines(keepends=True), start=1):
        try:
            if not raw.endswith(b"\n"):
                raise ValueError("no line end")
            done.add(int(json.loads(raw)["metadata"]["line"]))
        except (ValueError, KeyError, TypeError) as error:
            if position + len(raw) < len(content):
                raise LVLMError(
                    f"line {number} of answers file {str(path)!r} was not written by this program; "
                    "choose another answers file"
                ) from error
            file.truncate(position)
        position += len(raw)
    return done


@contextlib.contextmanager
def _opened(path: pathlib.Path):
    """The answers file, open for reading and appending, held by this process alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")
    except OSError as error:
        raise LVLMError(f"answers file {str(path)!r} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LVLMError(
                f"answers file {str(path)!r} is being written by another run; wait for it"
            ) from error
        except OSError:
            pass  # a file system without locks: nothing protects from a second run, but one run works
        yield file


def _line_of(question: Question, answer: Answer, model_id: str, method: dict | None) -> bytes:
    entry = {
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
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n"


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


def _batches(questions: list[Question], done: set[int], size: int) -> Iterator[list[Question]]:
    """Batches of questions that are not done, those of about one size together."""
    for start in range(0, len(questions), WINDOW * size):
        window = [one for one in questions[start : start + WINDOW * size] if one.line not in done]
        window.sort(key=lambda one: (len(one.image_names), length_class(one.text)))
        yield from (window[first : first + size] for first in range(0, len(window), size))


def _requests(
    batches: Iterable[list[Question]], folder: pathlib.Path, seed: int, fail: Callable[[int, str], None]
) -> Iterator[list[Request]]:
    """The questions of each batch with their pictures opened; `fail(line, reason)` for those that cannot be."""
    for batch in batches:
        ready = []
        for question in batch:
            try:
                images = [open_image(folder / name) for name in question.image_names]
                asked = conversation(images, question.text)
                ready.append(Request(question.line, asked, seed + question.line))
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
) -> Summary:
    """Answer every question of `question_file` that `answers_file` does not answer yet.

    `load` is called once, and only when something is left to do; with `streams` it gives a `Stream`, else an
    `Answerer`. `record` holds everything else that decides an answer (the hash of the question file is added here).
    Each question draws from the seed `seed + line number`, so an answer does not depend on where a run was interrupted.

    A line that is no question, a broken picture, a prompt that does not fit: each is reported on stderr with its line
    number, the others are answered. Raises `LVLMError` when the job as a whole cannot be done.
    """
    if batch_size < 1:
        raise LVLMError(f"batch size is {batch_size}; expected 1 or more")
    answers_path = pathlib.Path(answers_file)
    if not pathlib.Path(image_folder).is_dir():
        raise LVLMError(f"image folder {str(image_folder)!r} is not a folder; check the path")
    questions, failures = read_questions(question_file)
    record = record | {"questions": file_hash(question_file), "seed": seed}

    def fail(line: int, reason: str) -> None:
        failures[line] = reason
        tqdm.write(f"line {line} of {question_file}: {reason}", file=sys.stderr)

    for line, reason in list(failures.items()):
        fail(line, reason)
    with _opened(answers_path) as file:
        file.seek(0)
        content = file.read()
        # Before anything is dropped from the file: it may be somebody else's.
        _check_record(answers_path, record, bool(content))
        done = _answered_lines(file, content, answers_path)
        waiting = deque(question for question in questions if question.line not in done)
        summary = Summary(len(done), 0, failures)
        if not waiting:
            return summary
        stream = load() if streams else in_batches(load())
        batches = _batches(questions, done, batch_size)
        requests = _requests(batches, pathlib.Path(image_folder), seed, fail)
        known: dict[int, Answer] = {}
        with tqdm(total=len(questions), initial=len(done), unit="answer", disable=None) as bar:

            def write() -> None:
                ready = []
                while waiting and (waiting[0].line in known or waiting[0].line in failures):
                    question = waiting.popleft()
                    bar.update()
                    if question.line in known:
                        ready.append((question, known.pop(question.line)))
                file.write(b"".join(_line_of(*pair, model_id, record.get("method")) for pair in ready))
                file.flush()
                os.fsync(file.fileno())
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
