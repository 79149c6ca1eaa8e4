"""Files that are written whole: nothing outside the folder is touched, and nothing half-written stays."""

import json
import os
from pathlib import Path

import pytest

from lvlm_jax import files
from tests.killing import Function, contents, half_written, kill_at, more_lines
from tests.refusals import refused


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "new" / "scores.json"
    files.write_whole(path, "{}")
    with pytest.raises(ZeroDivisionError), files.atomic_file(path) as file:
        file.write(b"half")
        _ = 1 / 0
    assert contents(path.parent) == {"scores.json": b"{}"}
    umask = os.umask(0o027)
    try:
        files.write_whole(path, json.dumps({"a": "\ud800"}, ensure_ascii=False))
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o640
    assert contents(path.parent) == {"scores.json": b'{"a": "?"}'}  # half a letter cannot be written as UTF-8

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    refused("scores.json' cannot be written: No space left on device", files.write_whole, path, "after")
    assert contents(path.parent) == {"scores.json": b'{"a": "?"}'}


@pytest.mark.parametrize("guessed", [".part", ".tmp", ""])
def test_no_link_is_followed(tmp_path, monkeypatch, guessed):
    """No temporary file has a name that others can guess, or the name of the file itself."""
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("precious")
    out.mkdir()
    (out / f"scores.json{guessed}").symlink_to(victim)
    files.write_whole(out / "scores.json", "{}")
    assert victim.read_text() == "precious"
    assert (out / "scores.json").read_text() == "{}" and not (out / "scores.json").is_symlink()
    monkeypatch.setattr("secrets.token_hex", lambda _: "known")
    (out / ".0123456789abcdef.part").symlink_to(victim)
    files.remove_stale(out, ".*.part")
    (out / ".known.part").symlink_to(victim)
    refused("cannot be written: File exists", files.write_whole, out / "scores.json", "after")
    assert victim.read_text() == "precious"


def test_json_that_is_not_what_was_expected(tmp_path):
    path = tmp_path / "a.json"
    for content, message in (
        (None, "cannot be read: No such file"),
        (b"", "is empty"),
        (b"\xff", "is not UTF-8 text"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "holds a JSON list; expected an object"),
    ):
        if content is not None:
            path.write_bytes(content)
        refused(f"notes '.*a.json' {message}", files.read_json, path, "notes", dict)
    path.write_bytes(b"\xef\xbb\xbf[1]")  # as editors on Windows begin a file
    assert files.read_json(path, "notes") == files.read_json(path, "notes", list) == [1]


LINE = b"x" * 1000 + b"\n"


def write_again_and_again(path):
    """Files that take longer and longer to write, each followed by a line in a log."""
    for count in range(1, 100_000):
        with files.atomic_file(path) as file:
            file.writelines(LINE for _ in range(1000 * (1 + count % 20)))
        with path.with_name("log").open("ab") as log:
            log.write(b"\n")


def test_killed_at_any_moment_a_file_is_whole(tmp_path):
    """Inside a save too: the temporary file is there and grows."""
    path = tmp_path / "file"
    moments = [more_lines(tmp_path / "log", 3), *(half_written(tmp_path, ".*.part") for _ in range(2))]
    for moment in moments:
        assert kill_at(lambda: Function(write_again_and_again, path), moment, pause=0.004).in_time
        lines, rest = divmod(path.stat().st_size, len(LINE))
        assert rest == 0 and lines % 1000 == 0 and path.read_bytes() == LINE * lines
    (tmp_path / ".0123456789abcdef.part").touch()
    with files.atomic_file(tmp_path / "other") as file:  # what nobody holds went, what somebody writes stays
        (part,) = tmp_path.glob(".*.part")
        files.remove_stale(tmp_path, ".*.part")
        assert part.exists()
        file.write(b"x")
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", "log", "other"}


def test_what_is_no_file_is_not_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        refused("annotations .* is not a file", files.read_text, path, "annotations")
    for name in ("absent", "a" * 300, "a\0b"):
        refused("annotations .* cannot be read", files.read_json, tmp_path / name, "annotations")
    (tmp_path / "large").write_text("[1, 2, 3]")
    monkeypatch.setattr(files, "LARGEST", 8)
    refused("has 9 bytes; expected at most 8", files.read_json, tmp_path / "large", "annotations")
