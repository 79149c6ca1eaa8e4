"""Marks the slow cases of a test; the quick run has one case of every kind."""

from collections.abc import Container, Iterable, Mapping

import pytest


def named(names: Iterable, slow: Container) -> list:
    """The arguments of a test with one parameter; those in `slow` are marked."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in names]


def cases(table: Mapping[str, tuple], slow: Container[str] = ()) -> list:
    """The arguments of a parametrised test, by name; those with a name in `slow` are marked."""
    return [pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in slow)) for name, case in table.items()]
