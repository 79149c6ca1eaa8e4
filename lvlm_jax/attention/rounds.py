"""How often a loop of unknown length runs on average, as part of its operations' names.

A compiled program does not say it: the bounds are data. Whoever counts what a program does (`planning`) reads it there.
"""

import contextlib
import re

import jax

WRITTEN = re.compile(r"rounds_of_([\d.]+)")


def name_scope(rounds: float) -> contextlib.AbstractContextManager:
    """Loops that are traced inside run so often on average."""
    return jax.named_scope(f"rounds_of_{rounds:.3f}")


def read(name: str) -> float | None:
    """The number in the name of a loop, the innermost one; None without one."""
    counts = WRITTEN.findall(name)
    return float(counts[-1]) if counts else None
