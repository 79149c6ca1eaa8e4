"""Compiling for tests that run programs for milliseconds and compile them for seconds."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def quick_compiler() -> Iterator[None]:
    """Programs are hardly optimised in here; none of them is used outside, nor the other way round.

    The two kinds differ in the last bits, and what is compiled already is kept by shapes alone.
    """
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
        jax.clear_caches()
