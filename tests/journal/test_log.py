"""The log of answers: what it refuses, and what a kill or a full disk may do to it."""

import json

import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.journal.log import AnswerLog, seed_of

RECORD = {"model": "pocket", "seed": 0}


def read(path, record=RECORD, **settings):
    with AnswerLog(path, record, **settings) as log:
        return log.found


def test_entries_come_back_in_order(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    entries = [
        {"id": 1, "text": "line\nbreak"},
        {"id": 2, "text": "\u2028\x85é"},
        {"id": 3, "text": "\ud800"},
    ]
    with AnswerLog(path, RECORD) as log:
        assert log.found == []
        log.append(entries[:1])
        log.append(entries[1:])
    assert read(path) == [*entries[:2], {"id": 3, "text": "?"}]  # half a letter cannot be written as UTF-8
    assert read(path, read=lambda entry: entry["id"]) == [1, 2, 3]
    assert json.loads(path.read_text().split("\n")[0]) == {"record": RECORD}


def test_a_cut_line_is_dropped_and_nothing_else(tmp_path):
    path = tmp_path / "log"
    with AnswerLog(path, RECORD) as log:
        log.append([{"id": 1}, {"id": 2}])
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        found = read(path)
        whole = max(content[:length].count(b"\n") - 1, 0)
        assert found == [{"id": 1}, {"id": 2}][:whole]
        assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[: 1 + whole])


def test_other_settings(tmp_path):
    path = tmp_path / "log"
    read(path, {"model": "mistyped"})
    with AnswerLog(path, RECORD) as log:  # nothing was answered by the other
        log.append([{"id": 1}])
    before = path.read_bytes()
    with pytest.raises(LVLMError, match="begun with other settings \\(seed: 0, now 1\\).*give another --out"):
        read(path, RECORD | {"seed": 1})
    assert path.read_bytes() == before
    assert read(path, {"seed": 0, "model": "pocket"}) == [{"id": 1}]


def test_a_checkpoint_that_was_moved_is_the_same(tmp_path):
    path = tmp_path / "log"
    record = {"model": {"name": "/old/pocket", "sha256": "a"}, "method": {"name": "VCD"}}
    with AnswerLog(path, record) as log:
        log.append([{"id": 1}])
    assert read(path, record | {"model": {"name": "/new/pocket", "sha256": "a"}}) == [{"id": 1}]
    for changed in (
        {"model": {"name": "/old/pocket", "sha256": "b"}},
        {"model": {"name": "/new/pocket", "sha256": None}},
        {"method": {"name": "CMAC"}},
    ):
        with pytest.raises(LVLMError, match="begun with other settings"):
            read(path, record | changed)


@pytest.mark.parametrize(
    "content",
    [
        b"somebody's notes",
        b"somebody's notes\n",
        b"[]\n",
        b'{"record": 3}\n{"id": 1}\n',
        b'{"id": 1}\n',
        b"\xff\n",
    ],
)
def test_another_file_is_left_alone(tmp_path, content):
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(LVLMError, match="is no log of answers"):
        read(tmp_path / "log")
    assert (tmp_path / "log").read_bytes() == content


def test_entries_of_another_kind(tmp_path):
    with AnswerLog(tmp_path / "log", RECORD) as log:
        log.append([{"id": 1}])
    with pytest.raises(LVLMError, match="is no log of answers"):
        read(tmp_path / "log", read=lambda entry: entry["text"])


def test_one_run_at_a_time(tmp_path):
    with AnswerLog(tmp_path / "log", RECORD):
        with pytest.raises(LVLMError, match="is being written by another run"):
            AnswerLog(tmp_path / "log", RECORD)
    read(tmp_path / "log")


def test_what_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(LVLMError, match="cannot be written"):
        AnswerLog(tmp_path / "file" / "log", RECORD)
    with AnswerLog(tmp_path / "log", RECORD) as log:

        def full(_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(LVLMError, match="cannot be written: No space left on device"):
            log.append([{"id": 1}])


def test_seeds():
    seeds = {seed_of(seed, name) for seed in range(3) for name in ("chosen/a", "rejected/a", "chosen/b")}
    assert len(seeds) == 9 and all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(1, "é") == seed_of(1, "é")
