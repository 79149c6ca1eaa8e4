"""Runs a command of `lvlm` in this process."""

import sys

import pytest

from lvlm_jax.cli import main


def run(monkeypatch, capsys, *words):
    """Exit code, standard output and standard error of `lvlm WORDS`."""
    monkeypatch.setattr(sys, "argv", ["lvlm", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        main.main()
    printed = capsys.readouterr()
    return left.value.code, printed.out, printed.err
