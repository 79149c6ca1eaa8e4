"""Progress: a line now and then without a terminal, a bar on a terminal, nothing from quiet processes."""

import sys

import pytest

from lvlm_jax.journal import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it: `clock[0] += seconds`."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_a_line_every_ten_seconds_and_one_at_the_end(clock, capsys):
    with progress.Progress(400, 100, "answers") as shown:
        for seconds, count in ((4, 8), (5, 8), (1, 14), (9, 10), (2, 20)):
            clock[0] += seconds
            shown.update(count)
        assert lines(capsys) == [
            "answers: 130 of 400, 3.0 a second, 1:30 left",
            "answers: 160 of 400, 2.9 a second, 1:24 left",
        ]
        shown.update(240)
    assert lines(capsys) == ["answers: 400 of 400, 14.3 a second"]


def test_a_short_job_and_a_quiet_process_say_nothing(clock, capsys):
    for seconds, quiet in ((9, False), (90, True)):
        with progress.Progress(2, quiet=quiet) as shown:
            clock[0] += seconds
            shown.update(2)
    assert lines(capsys) == []


def test_slow_steps_notes_and_things_that_are_counted(clock, capsys):
    with progress.Progress(2000, title="capl") as shown:
        shown.note({"loss": "0.5"})
        clock[0] += 20
        shown.update()
    assert lines(capsys) == ["capl: 1 of 2000, 20.0 s each, 11:06:20 left, loss 0.5"]
    found = []
    for thing in progress.counted("abc", 3, title="letters"):
        clock[0] += 10
        found.append(thing)
    assert found == ["a", "b", "c"]
    assert lines(capsys)[0::2] == ["letters: 1 of 3, 10.0 s each, 0:20 left", "letters: 3 of 3, 10.0 s each"]


def test_a_terminal_has_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.Progress(4, title="answers") as shown:
        shown.update(4)
        progress.say("line 3 is wrong")
    written = capsys.readouterr().err
    assert "answers: 100%" in written and "\r" in written and "line 3 is wrong\n" in written
