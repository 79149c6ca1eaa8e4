"""Where a run was made: the commit of a checkout, and whether its files differ from it."""

import subprocess

from lvlm_jax.journal import place


def test_the_commit_of_a_checkout(tmp_path):
    def git(*words):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert place.commit(tmp_path) is None  # an installed package
    place.commit.cache_clear()
    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-qm", "one")
    first = place.commit(tmp_path)
    assert first == git("rev-parse", "--short=9", "HEAD")
    git("commit", "-qm", "two", "--allow-empty")
    assert place.in_history(first, tmp_path) and place.in_history(f"{first}, changed", tmp_path)
    dropped = git("rev-parse", "HEAD")
    git("reset", "-q", "--hard", first)
    assert place.in_history(dropped, tmp_path) is place.in_history("1234567", tmp_path) is False
    assert place.in_history("--help", tmp_path) is place.in_history(first, tmp_path / "none") is None
    place.commit.cache_clear()
    (tmp_path / "file").write_text("two")
    assert place.commit(tmp_path).endswith(", changed")
    assert " x " in place.machine()
