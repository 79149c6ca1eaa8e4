"""Optimisation levels of the compiler: low for most tests, which compile for seconds and run for milliseconds."""

import contextlib
import functools
import gc
from collections.abc import Iterator
from pathlib import Path

import jax
from jax._src import compiler

# The newer of XLA's two generators of loops for CPUs, and cutting a program up for threads, take half of the time.
QUICK = [("xla_cpu_use_fusion_emitters", False), ("xla_cpu_parallel_codegen_split_count", 1)]


def compile_quickly() -> None:
    """From now on programs are hardly optimised, except inside `optimised(True)`.

    JAX has an option for most of it, and none for options of XLA that hold for all programs of a process: those of the
    environment would hold inside as well.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    options_of = compiler.get_compile_options

    @functools.wraps(options_of)
    def get_compile_options(*arguments, **settings):
        options = options_of(*arguments, **settings)
        if jax.config.read("jax_disable_most_optimizations"):
            options.env_option_overrides = [*options.env_option_overrides, *QUICK]
        return options

    compiler.get_compile_options = get_compile_options


@contextlib.contextmanager
def optimised(wanted: bool) -> Iterator[None]:
    """Programs are compiled in here with all of XLA's optimisations, or with hardly any; by JAX's default, with all.

    None of them is used on the other side: the two kinds differ in the last bits, and what is compiled already is kept
    by shapes alone.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    if before is not wanted:
        yield
        return
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", not wanted)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
        jax.clear_caches()


def drop_programs(mappings: int = 15_000) -> None:
    """Drops all programs if they take more than this number of memory mappings; Linux allows a process 65,530."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > mappings:
        jax.clear_caches()
        gc.collect()
