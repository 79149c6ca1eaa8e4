"""Every input gives one short line, or a value that can be used: no traceback, no hang, no wrong value."""

import os
import time

import pytest

from lvlm_jax.cli import main
from lvlm_jax.errors import LVLMError
from tests.fuzz import commands, engine, pool, readers
from tests.fuzz.engine import Fault, Reader, attempt, same

QUICK = readers.shared(3_000)


@pytest.mark.parametrize("name", readers.READERS)
def test_reader(name, tmp_path):
    reader = readers.READERS[name]
    readers.feed(reader, QUICK[name], 1, lambda case: attempt(reader, case, tmp_path / "case"), shrink=True)


@pytest.mark.slow
def test_many_cases_in_child_processes(capsys):
    counts, faults = pool.run(readers.shared(pool.CASES))
    with capsys.disabled():
        print("\n" + pool.table(counts))
    assert not faults, "\n".join(faults[:20])
    assert sum(sum(found.values()) for found in counts.values()) >= pool.CASES
    for name, found in counts.items():  # a reader that refuses everything is fed the wrong cases
        assert found["accepted"], name


def test_every_command_is_fuzzed():
    assert commands.LINES.keys() == main.COMMANDS.keys()


def _long(case, folder):
    raise LVLMError("x" * 1000 + "\n\x1b[31m")


def _endless(case, folder):
    while True:
        pass


def _many(case, folder):
    import warnings

    for number in range(100):
        warnings.warn(f"{number}", stacklevel=1)


@pytest.mark.parametrize(
    "read, kind",
    [
        (lambda case, folder: {}["a"], "traceback"),
        (lambda case, folder: same(1, 2, "number"), "wrong"),
        (lambda case, folder: time.sleep(9), "hang"),
        (lambda case, folder: os.open(os.mkfifo(folder / "a") or folder / "a", os.O_RDONLY), "hang"),
        (_endless, "hang"),
        (_many, "storm"),
    ],
    ids=["traceback", "wrong", "waits", "a pipe", "computes", "warnings"],
)
def test_what_the_oracle_calls_a_fault(read, kind, tmp_path, monkeypatch):
    with pytest.raises(Fault) as caught:
        attempt(Reader("odd", None, read), None, tmp_path / "case", 0.1)
    assert caught.value.kind == kind


def test_messages_are_one_short_line(tmp_path):
    assert attempt(Reader("long", None, _long), None, tmp_path / "case") == engine.REFUSED
    with pytest.raises(Fault, match="message: 0 characters"):
        attempt(Reader("silent", None, _silent), None, tmp_path / "case")


def _silent(case, folder):
    raise LVLMError("")
