"""The log of answers: what it refuses, and what a kill or a full disk may do to it."""

import errno
import json
import shutil

import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.journal.lock import locked
from lvlm_jax.journal.log import AnswerLog, expect, read_log, seed_of
from tests.killing import Function

RECORD = {"model": "pocket", "seed": 0}
LAYOUTS = pytest.mark.parametrize("beside", [False, True], ids=["record in the first line", "record beside"])


def of_id(entry):
    return (entry["id"], entry) if "id" in entry else None


def opened(path, record=RECORD, beside=False, keys=None):
    return AnswerLog(path, record, of_id, keys, path.with_name(path.name + ".run.json") if beside else None)


def read(path, record=RECORD, **settings):
    with opened(path, record, **settings) as log:
        return list(log.answers.values())


def written(path, *entries, record=RECORD, **settings):
    with opened(path, record, **settings) as log:
        log.append(entries)
    return path.read_bytes()


@LAYOUTS
def test_entries_come_back_in_order(tmp_path, beside):
    path = tmp_path / "new" / "log.jsonl"
    entries = [{"id": 1, "text": "line\nbreak"}, {"id": 2, "text": "\u2028\x85é"}, {"id": 3, "text": "\ud800"}]
    with opened(path, beside=beside) as log:
        assert log.answers == {}
        log.append(entries[:1])
        log.append([{"cost": 3}, *entries[1:]])
    found = [*entries[:2], {"id": 3, "text": "?"}]  # half a letter cannot be written as UTF-8
    assert read(path, beside=beside) == found
    if beside:
        assert json.loads(path.with_name("log.jsonl.run.json").read_text()) == RECORD
    else:
        assert json.loads(path.read_text().split("\n")[0]) == {"record": RECORD}
        assert list(read_log(path, RECORD, of_id, {1, 2, 3}).values()) == found


@LAYOUTS
@pytest.mark.parametrize("tail", [b"", b'{"id": 3, "te', b'{"id": 3, "te\n', b"\0\0\0\n", b"\0\0"])
def test_a_last_line_that_is_not_whole_is_dropped(tmp_path, beside, tail):
    path = tmp_path / "log"
    whole = written(path, {"id": 1}, {"id": 2}, beside=beside)
    path.write_bytes(whole + tail)
    if not beside:
        assert list(read_log(path, RECORD, of_id)) == [1, 2] and path.read_bytes() == whole + tail
    assert read(path, beside=beside) == [{"id": 1}, {"id": 2}]
    assert path.read_bytes() == whole
    path.write_bytes(whole + b"{cut\n" + b'{"id": 3}\n')
    with pytest.raises(LVLMError, match=f"^line {4 - beside} of .* is not JSON"):
        read(path, beside=beside)


def test_a_cut_line_is_dropped_and_nothing_else(tmp_path):
    path = tmp_path / "log"
    content = written(path, {"id": 1}, {"id": 2})
    for length in range(len(content)):
        path.write_bytes(content[:length])
        found = read(path)
        whole = max(content[:length].count(b"\n") - 1, 0)
        assert found == [{"id": 1}, {"id": 2}][:whole]
        assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[: 1 + whole])


def test_other_settings(tmp_path):
    path = tmp_path / "log"
    read(path, {"model": "mistyped"})
    assert read_log(path, RECORD, of_id) == {}
    before = written(path, {"id": 1})  # nothing was answered by the other
    for attempt in (read, lambda *given: read_log(*given, of_id)):
        with pytest.raises(LVLMError, match="begun with other settings \\(seed: 0, now 1\\).*write somewhere else"):
            attempt(path, RECORD | {"seed": 1})
    assert path.read_bytes() == before
    assert read(path, {"seed": 0, "model": "pocket"}) == [{"id": 1}]


def test_a_checkpoint_that_was_moved_is_the_same(tmp_path):
    path = tmp_path / "log"
    record = {"model": {"name": "/old/pocket", "sha256": "a"}, "method": {"name": "VCD"}}
    written(path, {"id": 1}, record=record)
    assert read(path, record | {"model": {"name": "/new/pocket", "sha256": "a"}}) == [{"id": 1}]
    for changed in (
        {"model": {"name": "/old/pocket", "sha256": "b"}},
        {"model": {"name": "/new/pocket", "sha256": None}},
        {"method": {"name": "CMAC"}},
    ):
        with pytest.raises(LVLMError, match="begun with other settings"):
            read(path, record | changed)


@pytest.mark.parametrize("record", ["[1]", "3", "null", '"a"', "[" * 100_000, "{", "", None])
def test_a_record_beside_that_is_none(tmp_path, record):
    path = tmp_path / "log"
    before = written(path, {"id": 1}, beside=True)
    if record is None:
        path.with_name("log.run.json").unlink()
    else:
        path.with_name("log.run.json").write_text(record)
    with pytest.raises(LVLMError, match="log.run.json") as caught:
        read(path, beside=True)
    assert "\n" not in str(caught.value) and path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [b"somebody's notes", b"somebody's notes\n", b"[]\n", b'{"record": 3}\n{"id": 1}\n', b'{"id": 1}\n', b"\xff\n"],
)
def test_another_file_is_left_alone(tmp_path, content):
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(LVLMError, match="is no log of answers"):
        read(tmp_path / "log")
    assert (tmp_path / "log").read_bytes() == content


@LAYOUTS
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda line: b"[1]\n", "a JSON list, not an object"),
        (lambda line: b"null\n", "a JSON NoneType, not an object"),
        (lambda line: line.replace(b'"id"', b'"ID"').replace(b'"n"', b'"id"'), "its n is missing"),
        (lambda line: line.replace(b"2", b"999"), "answers 999, which is not asked"),
        (lambda line: line.replace(b"2", b"1e999"), "answers inf, which is not asked"),
        (lambda line: line.replace(b"2", b"[2]"), "no answer that this program wrote"),
        (lambda line: line.replace(b"2", b"1"), "answers 1 a second time"),
        (lambda line: line + line, "answers 2 a second time"),
    ],
)  # fmt: skip
def test_an_edited_line_is_named(tmp_path, beside, edit, message):
    def strict(entry):
        if "n" not in entry:
            raise ValueError("its n is missing")
        return entry["id"], entry

    path = tmp_path / "log"
    lines = written(path, *({"id": number, "n": 0} for number in (1, 2, 3)), beside=beside).splitlines(True)
    second = 2 - beside
    lines[second] = edit(lines[second])
    path.write_bytes(before := b"".join(lines))
    number = second + 1 + (message == "answers 2 a second time")
    beside_file = path.with_name("log.run.json") if beside else None
    with pytest.raises(LVLMError, match=f"^line {number} of '.*log' .*{message}"):
        AnswerLog(path, RECORD, strict, {1, 2, 3}, beside_file)
    assert path.read_bytes() == before
    lines[second] = b'{"id": 2, "n": 0}\n'
    path.write_bytes(b"".join(lines))
    AnswerLog(path, RECORD, strict, {1, 2, 3}, beside_file).close()  # the error left no lock behind


@pytest.mark.parametrize(
    ("kinds", "row"),
    [({"n": int}, {"n": True}), ({"n": int}, {"n": 1.0}), ({"n": (int, float)}, {"n": float("inf")}), ({"n": str}, {})],
)
def test_what_is_expected_of_fields(kinds, row):
    expect({"n": 1, "b": True, "x": 0.5}, {"n": int, "b": bool, "x": (int, float)})
    with pytest.raises((TypeError, ValueError, KeyError), match="n"):
        expect(row, kinds)


@LAYOUTS
def test_one_run_at_a_time(tmp_path, beside):
    with opened(tmp_path / "log", beside=beside):
        with pytest.raises(LVLMError, match="is being written by another run"):
            opened(tmp_path / "log", beside=beside)
        (tmp_path / "link").symlink_to(tmp_path / "log")
        with pytest.raises(LVLMError, match="is being written by another run"):
            opened(tmp_path / "link", beside=beside)
    (tmp_path / ".log.lock").touch()  # as a kill leaves it
    read(tmp_path / "log", beside=beside)
    assert not (tmp_path / ".log.lock").exists()


def increment(path):
    """Reads a number and writes the next, in the lock of the file, which is waited for."""
    for _ in range(50):
        with locked(path, wait=True):
            number = int(path.read_text())
            path.write_text("")
            path.write_text(str(number + 1))


def test_no_two_processes_hold_a_lock_that_others_give_back(tmp_path):
    path = tmp_path / "number"
    path.write_text("0")
    children = [Function(increment, path) for _ in range(3)]
    for child in children:
        child.finish()
    assert path.read_text() == "150"


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refused(number):
        def flock(*_):
            raise OSError(number, "no locks")

        return flock

    monkeypatch.setattr("fcntl.flock", refused(errno.ENOLCK))
    with opened(tmp_path / "log") as first, opened(tmp_path / "log"):
        first.append([{"id": 1}])
    assert read(tmp_path / "log") == [{"id": 1}]
    monkeypatch.setattr("fcntl.flock", refused(errno.EIO))
    with pytest.raises(LVLMError, match="cannot be written: no locks"):
        read(tmp_path / "log")


def test_what_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "log", tmp_path):
        with pytest.raises(LVLMError, match="cannot be written"):
            opened(path)
    with opened(tmp_path / "log") as log:
        log.append([{"id": 1}])
        before = log.path.read_bytes()

        def full(_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr("os.fsync", full)
            with pytest.raises(LVLMError, match="cannot be written: No space left on device"):
                log.append([{"id": 2}])
        assert log.path.read_bytes() == before  # no half line, behind which the next would be lost
        log.append([{"id": 3}])
    assert read(tmp_path / "log") == [{"id": 1}, {"id": 3}]


@pytest.mark.parametrize("vanish", ["the file", "the folder", "the folder is another"])
def test_a_log_that_vanishes(tmp_path, vanish):
    path = tmp_path / "out" / "log"
    with opened(path) as log:
        log.append([{"id": 1}])
        if vanish == "the file":
            path.unlink()
        else:
            shutil.rmtree(path.parent)
        if vanish == "the folder is another":
            path.parent.mkdir()
            path.touch()
        with pytest.raises(LVLMError, match="is gone"):
            log.append([{"id": 2}])


def test_seeds():
    seeds = {seed_of(seed, name) for seed in range(3) for name in ("chosen/a", "rejected/a", "chosen/b")}
    assert len(seeds) == 9 and all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(1, "é") == seed_of(1, "é")
