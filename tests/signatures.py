"""Checks the signatures of the package while tests run (see `conftest.py`)."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

# PEP 484: where a signature says float, an int will do.
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable) -> Callable:
    """`function` with its arguments and result checked at every call.

    Constructors are left alone: JAX also builds pytrees of placeholders, specifications and None. So are functions
    inside of others, which would be wrapped again in every call; those around them are checked.
    """
    alone = function.__name__ == "__init__" or "<locals>" in function.__qualname__
    return function if alone else _beartype(function)
