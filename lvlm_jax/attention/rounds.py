"""The average number of rounds of a loop of unknown length, written into the names of its operations.

A compiled program does not contain this number, because the loop's bounds are data. `planning` reads it from the names.
"""

import contextlib
import re

import jax

WRITTEN = re.compile(r"rounds_of_([\d.]+)")


def name_scope(rounds: float) -> contextlib.AbstractContextManager:
    """A context that names the loops traced inside it as running `rounds` times on average."""
    return jax.named_scope(f"rounds_of_{rounds:.3f}")


def read(name: str) -> float | None:
    """The average rounds of the innermost loop in an operation's name; None if the name has none."""
    counts = WRITTEN.findall(name)
    return float(counts[-1]) if counts else None
