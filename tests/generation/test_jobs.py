"""Jobs: every question answered once, whatever lines are broken and however often the job is killed."""

import base64
import json
import os
import re
import shutil
import time
from contextlib import nullcontext

import pytest
from PIL import Image

from lvlm_jax.errors import LVLMError
from lvlm_jax.generation.jobs import Answer, run_job
from lvlm_jax.generation.questions import conversation
from lvlm_jax.journal.log import seed_of
from tests.killing import Function, contents, kill_and_finish, more_lines


class Echo:
    """A stand-in for a model: answers with the question and its settings, and refuses prompts with "too long"."""

    def __init__(self):
        self.loaded = 0
        self.batches = []

    def load(self):
        self.loaded += 1
        return self.answer

    def answer(self, conversations, seeds):
        self.batches.append(len(conversations))
        parts = [messages[0]["content"] for messages in conversations]
        if any("too long" in part.get("text", "") for content in parts for part in content):
            raise LVLMError("the prompt has 99 tokens, the context is 9")
        return [
            Answer(f"{seed}:" + "|".join(part.get("text", "image") for part in content), "stop", 3)
            for content, seed in zip(parts, seeds, strict=True)
        ]


@pytest.fixture
def job(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    (tmp_path / "text.png").write_text("no picture")

    def run(lines, model=None, record=None, name="answers.jsonl", **settings):
        (tmp_path / "questions.jsonl").write_text("\n".join(lines))
        load = (model or Echo()).load
        record = record if record is not None else {"model": "echo", "method": None}
        files = tmp_path / "questions.jsonl", tmp_path / name
        summary = run_job(load, *files, record, image_folder=tmp_path, **settings)
        return summary, [json.loads(line) for line in files[1].read_text(encoding="utf-8").splitlines()]

    run.folder = tmp_path
    return run


def line(number, text="What is this?", image="a.png"):
    entry = {"question_id": number, "text": text}
    return json.dumps(entry if image is None else entry | {"image": image})


def test_answers_have_llava_fields_in_the_order_of_the_questions(job):
    asked = [line(7), line(7, "<image> or <image>?", ["a.png", "b.png"]), line("x", "Hello", None)]
    summary, answers = job(asked, batch_size=2, seed=10, model_id="m")
    assert (summary.before, summary.now, summary.failures) == (0, 3, {})
    assert [list(answer) for answer in answers] == [
        ["question_id", "prompt", "text", "model_id", "image", "metadata"]
    ] * 3
    assert [answer["question_id"] for answer in answers] == [7, 7, "x"]
    assert [answer["prompt"] for answer in answers] == ["What is this?", "<image> or <image>?", "Hello"]
    seven, x = seed_of(10, "7"), seed_of(10, '"x"')
    assert [answer["text"] for answer in answers] == [
        f"{seven}:image|What is this?",
        f"{seven}:image|or|image|?",
        f"{x}:Hello",
    ]
    assert [answer["image"] for answer in answers] == ["a.png", ["a.png", "b.png"], None]
    assert answers[0]["metadata"] == {"line": 1, "method": None, "finish_reason": "stop", "tokens": 3}


def test_a_draw_depends_on_the_id_and_the_seed_and_not_on_the_line(job):
    def texts(lines, seed):
        name = f"{len(list(job.folder.iterdir()))}.jsonl"
        return {row["question_id"]: row["text"] for row in job(lines, name=name, seed=seed)[1]}

    asked = [line(number, image=None) for number in (1, 2, "1")]
    first, turned, other = texts(asked, 0), texts(asked[::-1], 0), texts(asked, 1)
    assert first == turned
    assert len(set(first.values()) | set(other.values())) == 6


def test_bad_lines_are_named_and_the_others_answered(job, capsys):
    os.mkfifo(job.folder / "pipe.png")
    (job.folder / "bad.ppm").write_bytes(b"P6\n4 x\n255\n")
    encoded = base64.b64encode((job.folder / "a.png").read_bytes()).decode()
    asked = {
        line(1): None,
        f'{{"question_id": {"9" * 5000}, "text": "What?"}}': "5000 digits",
        line(3, image="pipe.png"): "is a pipe",
        line(4, image="a" * 300 + ".png"): "File name too long",
        line(5, image="bad.ppm"): "cannot be decoded",
        line("caf\ud83d"): None,
        line(7, image=f"data:image/png;base64,{encoded}"): None,
        line(8, image="https://example.org/a.png"): "downloads are off by default",
        "{not json": "not JSON",
        line(10, image="text.png"): "not in an image format",
        line(11, image="missing.png"): "does not exist",
        line(12, "this is too long"): "99 tokens",
        line(13, "<image><image>?"): "2 <image> placeholders but 1 images",
        "[1]": "JSON list",
        line(15, text=3): "text is 3",
        line(16, image=5): "image is 5",
        line([17]): "question_id is [17]",
        "": None,
        line(19): None,
    }
    summary, answers = job(list(asked), batch_size=4)
    assert [answer["question_id"] for answer in answers] == [1, "caf?", 7, 19]
    expected = {number: reason for number, reason in enumerate(asked.values(), 1) if reason}
    assert summary.failures.keys() == expected.keys()
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == len(expected)
    for number, reason in expected.items():
        assert reason in summary.failures[number] and "\n" not in summary.failures[number]
        assert any(f"line {number} of" in text for text in printed)
    summary, _ = job([line(1, image="http://127.0.0.1:1/a.png")], allow_urls=True, name="downloaded.jsonl")
    assert "cannot be downloaded" in summary.failures[1]


def test_a_failed_line_is_tried_again_by_the_next_run_and_a_finished_job_loads_no_model(job):
    asked = [line(1), line(2, image="late.png"), line(3)]
    summary, _ = job(asked)
    assert list(summary.failures) == [2]
    Image.new("RGB", (4, 4)).save(job.folder / "late.png")
    summary, answers = job(asked)
    assert (summary.before, summary.now, summary.failures) == (2, 1, {})
    assert sorted(answer["question_id"] for answer in answers) == [1, 2, 3]
    model = Echo()
    summary, answers = job(asked, model)
    assert model.loaded == 0 and summary.before == 3 and len(answers) == 3


def test_a_line_cut_short_is_dropped_and_answered_again(job):
    asked, path = [line(number) for number in (1, 2, 3)], job.folder / "answers.jsonl"
    _, whole = job(asked)
    kept = b"".join(path.read_bytes().splitlines(keepends=True)[:2])
    for tail in (b'{"question_id": 3, "te', b'{"question_id": 3, "te\n', b"\0\0\0\n"):
        path.write_bytes(kept + tail)
        summary, answers = job(asked)
        assert summary.before == 2 and answers == whole


@pytest.mark.parametrize("change", ["record", "questions", "seed"])
def test_other_settings_are_refused(job, change):
    job([line(1)], record={"method": {"name": "CMAC", "alpha": 3.0}})
    before = (job.folder / "answers.jsonl").read_bytes()
    record = {"method": {"name": "CMAC", "alpha": 1.0 if change == "record" else 3.0}}
    asked = [line(1), line(2)] if change == "questions" else [line(1)]
    message = "method.alpha: 3.0, now 1.0" if change == "record" else f"{change}: "
    with pytest.raises(LVLMError, match=message):
        job(asked, record=record, seed=int(change == "seed"))
    assert (job.folder / "answers.jsonl").read_bytes() == before


def test_files_that_cannot_be_used(job):
    path = job.folder / "answers.jsonl"
    path.write_text("my notes, without a line end")
    with pytest.raises(LVLMError, match="write to another file"):
        job([line(1)])
    assert path.read_text() == "my notes, without a line end"
    for lines, message in (([""], "is empty"), (["[", line(1) + ",", line(2), "]"], "one JSON list")):
        with pytest.raises(LVLMError, match=message):
            job(lines)
    for name, images, message in (("questions", "nowhere", "image folder"), ("nothing", "", "cannot be read")):
        with pytest.raises(LVLMError, match=message):
            run_job(None, job.folder / f"{name}.jsonl", job.folder / "a", {}, image_folder=job.folder / images)


def test_images_go_where_the_placeholders_are():
    def kinds(images, text):
        return [part.get("image") or part["text"] for part in conversation(images, text)[0]["content"]]

    assert kinds(["a", "b"], "What differs?") == ["a", "b", "What differs?"]
    assert kinds(["a", "b"], "Is <image> like <image>?") == ["Is", "a", "like", "b", "?"]
    assert kinds([], "Hello") == ["Hello"]
    for images, text in ((["a"], "<image><image> Why?"), (["a", "b"], "<image> Why?"), ([], "<image> Why?")):
        with pytest.raises(LVLMError, match="placeholders"):
            conversation(images, text)
    with pytest.raises(LVLMError, match="empty"):
        conversation(["a"], " ")


def slow_job(questions, answers):
    """In a process of its own; every answer fills several blocks of the disk."""

    def answer(conversations, seeds):
        time.sleep(0.02)
        return [Answer("é" * 3000 + str(seed), "stop", 1) for seed in seeds]

    run_job(lambda: answer, questions, answers, {"model": "slow"}, batch_size=3)


def test_killed_again_and_again_no_line_is_lost_or_doubled(tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(line(number, image=None) for number in range(100)))
    whole, killed = tmp_path / "whole" / "answers.jsonl", tmp_path / "killed" / "answers.jsonl"
    slow_job(questions, whole)

    def start():
        return Function(slow_job, questions, killed)

    kill_and_finish(start, more_lines(killed), times=3, longest=0.1)
    assert contents(killed.parent) == contents(whole.parent)
    assert len(contents(whole.parent)) == 2  # the answers and their record


def test_an_edited_answers_file_is_refused(job):
    asked, path, model = [line(number) for number in (1, 2, 3)], job.folder / "answers.jsonl", Echo()
    job(asked)
    lines = path.read_bytes().splitlines(keepends=True)
    for old, new, message in (
        (b"{.*}", b"[1]", "\\(a JSON list, not an object"),
        (b"{.*}", b"{not json}", "is not JSON"),
        (b'"line": 2', b'"line": 1e999', "\\(its line is inf"),
        (b'"line": 2', b'"line": true', "\\(its line is True"),
        (b'"line": 2', b'"line": 999', "answers 999, which is not a question of this run"),
        (b'"line": 2', b'"line": 1', "answers 1 a second time"),
        (b"metadata", b"m", "\\(it has no 'metadata'"),
    ):
        before = lines[0] + re.sub(old, new, lines[1]) + lines[2]
        path.write_bytes(before)
        with pytest.raises(LVLMError, match=f"^line 2 of '.*answers.jsonl' .*{message}"):
            job(asked, model)
        assert path.read_bytes() == before and model.loaded == 0


def test_an_answers_folder_that_vanishes_is_no_success(tmp_path):
    (tmp_path / "questions.jsonl").write_text("\n".join(line(number, image=None) for number in range(4)))
    model = Echo()

    def vanishing(conversations, seeds):
        if len(model.batches) == 2:
            shutil.rmtree(tmp_path / "out")
        return model.answer(conversations, seeds)

    with pytest.raises(LVLMError, match="answers.jsonl' is gone"):
        run_job(lambda: vanishing, tmp_path / "questions.jsonl", tmp_path / "out" / "answers.jsonl", {})
    assert len(model.batches) == 3  # it stops at once


@pytest.mark.parametrize("room", range(9))
def test_a_full_disk_is_one_error_and_the_next_run_goes_on(tmp_path, monkeypatch, room):
    """The disk is full from the first, second, ... fsync on: of the record, its folder and six answers."""
    (tmp_path / "questions.jsonl").write_text("\n".join(line(number, image=None) for number in range(6)))
    left = iter([True] * room)

    def run(name):
        return run_job(Echo().load, tmp_path / "questions.jsonl", tmp_path / name / "answers.jsonl", {})

    def fsync(_):
        if not next(left, False):
            raise OSError(28, "No space left on device")

    run("whole")
    with monkeypatch.context() as full:
        full.setattr("os.fsync", fsync)
        with pytest.raises(LVLMError, match="No space left on device") if room < 8 else nullcontext():
            run("full")
    run("full")
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")
