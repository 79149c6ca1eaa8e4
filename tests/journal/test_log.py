"""The log of answers: what it refuses, and its state after a kill or on a full disk."""

import errno
import json
import shutil

import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.journal.lock import locked
from lvlm_jax.journal.log import AnswerLog, expect, read_log, seed_of
from tests.killing import Function

RECORD = {"model": "pocket", "seed": 0}
TWO = [{"id": 1}, {"id": 2}]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log"


@pytest.fixture(params=[False, True], ids=["record in the first line", "record beside"])
def beside(request):
    return request.param


def of_id(entry):
    return (entry["id"], entry) if "id" in entry else None


def opened(path, record=RECORD, beside=False, keys=None, key_of=of_id):
    return AnswerLog(path, record, key_of, keys, path.with_name(path.name + ".run.json") if beside else None)


def read(path, record=RECORD, **settings):
    with opened(path, record, **settings) as log:
        return list(log.answers.values())


def written(path, *entries, record=RECORD, **settings):
    with opened(path, record, **settings) as log:
        log.append(entries)
    return path.read_bytes()


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


@pytest.mark.parametrize("tail", [b"", b'{"id": 3, "te\n', b"\0\0\0\n", b"\0\0"])
def test_a_last_line_that_is_not_whole_is_dropped(path, beside, tail):
    whole = written(path, *TWO, beside=beside)
    path.write_bytes(whole + tail)
    if not beside:
        assert list(read_log(path, RECORD, of_id)) == [1, 2] and path.read_bytes() == whole + tail
    assert read(path, beside=beside) == TWO
    assert path.read_bytes() == whole
    path.write_bytes(whole + b"{cut\n" + b'{"id": 3}\n')
    with pytest.raises(LVLMError, match=f"^line {4 - beside} of .* is not JSON"):
        read(path, beside=beside)


def test_a_cut_line_is_dropped_and_nothing_else(path):
    content = written(path, *TWO)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        whole = max(content[:length].count(b"\n") - 1, 0)
        assert read(path) == TWO[:whole]
        assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[: 1 + whole])


def test_other_settings(path):
    read(path, {"model": "mistyped"})
    assert read_log(path, RECORD, of_id) == {}
    before = written(path, {"id": 1})  # nothing was answered by the other
    for attempt in (read, lambda *given: read_log(*given, of_id)):
        with pytest.raises(LVLMError, match="begun with other settings \\(seed: 0, now 1\\).*write to another file"):
            attempt(path, RECORD | {"seed": 1})
    assert path.read_bytes() == before
    assert read(path, {"seed": 0, "model": "pocket"}) == [{"id": 1}]


def test_a_checkpoint_that_was_moved_is_the_same(path):
    def record(name, sha256, method="VCD"):
        return {"model": {"name": f"/{name}/pocket", "sha256": sha256}, "method": {"name": method}}

    written(path, {"id": 1}, record=record("old", "a"))
    assert read(path, record("new", "a")) == [{"id": 1}]
    for changed in (record("old", "b"), record("new", None), record("old", "a", "CMAC")):
        with pytest.raises(LVLMError, match="begun with other settings"):
            read(path, changed)


@pytest.mark.parametrize("record", ["[1]", "null", "[" * 100_000, "{", "", None])
def test_a_record_beside_that_is_none(path, record):
    before = written(path, {"id": 1}, beside=True)
    path.with_name("log.run.json").unlink()
    if record is not None:
        path.with_name("log.run.json").write_text(record)
    with pytest.raises(LVLMError, match=r"^[^\n]*log.run.json[^\n]*\Z"):
        read(path, beside=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b"[]\n", b'{"record": 3}\n{"id": 1}\n', b"\xff\n"])
def test_another_file_is_left_alone(path, content):
    path.write_bytes(content)
    with pytest.raises(LVLMError, match="is not a log of answers"):
        read(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda line: b"[1]\n", "a JSON list, not an object"),
        (lambda line: b"null\n", "a JSON NoneType, not an object"),
        (lambda line: line.replace(b'"id"', b'"ID"').replace(b'"n"', b'"id"'), "its n is missing"),
        (lambda line: line.replace(b"2", b"999"), "answers 999, which is not a question of this run"),
        (lambda line: line.replace(b"2", b"1e999"), "answers inf, which is not a question of this run"),
        (lambda line: line.replace(b"2", b"[2]"), "not an answer that this program wrote"),
        (lambda line: line.replace(b"2", b"1"), "answers 1 a second time"),
        (lambda line: line + line, "answers 2 a second time"),
    ],
)
def test_an_edited_line_is_named(path, beside, edit, message):
    def strict(entry):
        if "n" not in entry:
            raise ValueError("its n is missing")
        return entry["id"], entry

    strictly = dict(beside=beside, keys={1, 2, 3}, key_of=strict)
    whole = written(path, *({"id": number, "n": 0} for number in (1, 2, 3)), beside=beside)
    lines, second = whole.splitlines(True), 2 - beside
    lines[second] = edit(lines[second])
    path.write_bytes(b"".join(lines))
    number = second + 1 + (message == "answers 2 a second time")
    with pytest.raises(LVLMError, match=f"^line {number} of '.*log' .*{message}"):
        read(path, **strictly)
    assert path.read_bytes() == b"".join(lines)
    path.write_bytes(whole)
    read(path, **strictly)  # the error left no lock behind


@pytest.mark.parametrize(
    ("kinds", "row"),
    [({"n": int}, {"n": True}), ({"n": int}, {"n": 1.0}), ({"n": (int, float)}, {"n": float("inf")}), ({"n": str}, {})],
)
def test_what_is_expected_of_fields(kinds, row):
    expect({"n": 1, "b": True, "x": 0.5}, {"n": int, "b": bool, "x": (int, float)})
    with pytest.raises((TypeError, ValueError, KeyError), match="n"):
        expect(row, kinds)


def test_one_run_at_a_time(path, beside):
    (link := path.with_name("link")).symlink_to(path)
    with opened(path, beside=beside):
        for name in (path, link):
            with pytest.raises(LVLMError, match="is being written by another run"):
                opened(name, beside=beside)
    (lock := path.with_name(".log.lock")).touch()  # as a kill leaves it
    read(path, beside=beside)
    assert not lock.exists()


def increment(path):
    """Waits for the file's lock, then reads a number and writes the next."""
    for _ in range(50):
        with locked(path, wait=True):
            number = int(path.read_text())
            path.write_text("")
            path.write_text(str(number + 1))


def test_no_two_processes_hold_a_lock_that_others_give_back(path):
    path.write_text("0")
    for child in [Function(increment, path) for _ in range(3)]:
        child.finish()
    assert path.read_text() == "150"


def test_a_file_system_without_locks(path, monkeypatch):
    number = errno.ENOLCK

    def refused(*_):
        raise OSError(number, "no locks")

    monkeypatch.setattr("fcntl.flock", refused)
    with opened(path) as first, opened(path):
        first.append([{"id": 1}])
    assert read(path) == [{"id": 1}]
    number = errno.EIO
    with pytest.raises(LVLMError, match="cannot be written: no locks"):
        read(path)


def test_what_cannot_be_written_is_one_line(path, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "log", tmp_path):
        with pytest.raises(LVLMError, match="cannot be written"):
            opened(place)
    with opened(path) as log:
        log.append([{"id": 1}])
        before = path.read_bytes()

        def full(_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr("os.fsync", full)
            with pytest.raises(LVLMError, match="cannot be written: No space left on device"):
                log.append([{"id": 2}])
        assert path.read_bytes() == before  # no half line, behind which the next would be lost
        log.append([{"id": 3}])
    assert read(path) == [{"id": 1}, {"id": 3}]


@pytest.mark.parametrize("vanish", ["the file", "the folder", "the folder is another"])
def test_a_log_that_vanishes(tmp_path, vanish):
    path = tmp_path / "out" / "log"
    with opened(path) as log:
        log.append([{"id": 1}])
        path.unlink() if vanish == "the file" else shutil.rmtree(path.parent)
        if vanish == "the folder is another":
            path.parent.mkdir()
            path.touch()
        with pytest.raises(LVLMError, match="is gone"):
            log.append([{"id": 2}])


def test_seeds():
    seeds = {seed_of(seed, name) for seed in range(3) for name in ("chosen/a", "rejected/a", "chosen/b")}
    assert len(seeds) == 9 and all(0 <= seed < 2**31 for seed in seeds)
    assert seed_of(1, "é") == seed_of(1, "é")
