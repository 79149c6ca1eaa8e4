"""Caches compiled programs: on disk for later runs, in memory for repeated calls.

The folders on disk are private to the user, because the machine code in them is executed: a folder that another user
owns or can write to is never used. In memory, only the most recently used programs are kept, so that a server that
receives requests of many shapes does not grow without bound.
"""

import collections
import functools
import inspect
import os
import pathlib
import stat
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

# Set to 0, off, false or no: nothing is read from disk or written to it.
SWITCH = "LVLM_JAX_COMPILATION_CACHE"

# How many programs are kept in memory; beyond that, the least recently used program is dropped.
LIMIT_VARIABLE = "LVLM_JAX_PROGRAMS"
DEFAULT_LIMIT = (
    128  # each takes two to five megabytes on a CPU for a small model, twenty for one of 7 billion parameters
)

# On GPUs, XLA would merge the projections of queries, keys and values, and for that copy their weights side by side at
# every token: 6 GB for a model of 7 billion parameters, whose weights are 13 GB.
GPU_OPTIONS = {"xla_gpu_dot_merger_threshold_mb": 0}

_PARAMETERS = "params"  # the argument whose shapes are the same in all calls with one configuration


def switched_off(switch: str) -> bool:
    """Whether an environment variable is set to 0, off, false or no."""
    return os.environ.get(switch, "").strip().lower() in ("0", "off", "false", "no")


def cache_folder(name: str) -> pathlib.Path:
    """`$XDG_CACHE_HOME/lvlm_jax/name`, or the same under `~/.cache`."""
    # By the XDG rule, a relative path in the variable counts as unset.
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        base = pathlib.Path.home() / ".cache"
    return base / "lvlm_jax" / name


def _why_unsafe(folder: pathlib.Path) -> str | None:
    """Why programs in `folder` must not be run; None if only this user can have put them there."""
    status = folder.stat()
    if not stat.S_ISDIR(status.st_mode):
        return "it is not a folder"
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        return f"it belongs to user {status.st_uid}, not to you"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "other users may write to it"
    return None


def private_folder(name: str, switch: str) -> pathlib.Path | None:
    """Makes a cache folder, and its parent folder, to which only this user can write.

    If that is not possible, returns None with a warning that says why and which variable turns the warning off.
    """
    try:
        folder = cache_folder(name)
        for path in (folder.parent, folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if reason := _why_unsafe(path):
                warnings.warn(
                    f"compiled programs are not kept: {path} is not used because {reason}; "
                    f"remove it, or silence this with {switch}=0",
                    stacklevel=3,
                )
                return None
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        warnings.warn(f"compiled programs are not kept: {error}; silence this with {switch}=0", stacklevel=3)
        return None
    return folder


def enable_cache() -> pathlib.Path | None:
    """Caches compiled programs on disk from now on; calling it again changes nothing.

    Returns the folder, or None without one: because of `LVLM_JAX_COMPILATION_CACHE=0`, or because the folder cannot be
    made or is not safe (a warning says which). A folder that the user has set through JAX's own
    `jax_compilation_cache_dir` is left alone.
    """
    if switched_off(SWITCH):
        return None
    chosen = jax.config.jax_compilation_cache_dir
    if chosen:
        return pathlib.Path(chosen)
    folder = private_folder("xla", SWITCH)
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Start-up runs many programs that each compile in a few hundredths of a second; together they take seconds.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def max_programs() -> int:
    """How many programs are kept in memory: the number in `LVLM_JAX_PROGRAMS` if it is 1 or more, else the default."""
    word = os.environ.get(LIMIT_VARIABLE, "").strip()
    return int(word) if word.isdecimal() and int(word) > 0 else DEFAULT_LIMIT


class CachedJit:
    """A function compiled by `jax.jit` that drops its least recently used programs.

    `lower` and `trace` are those of `jax.jit`.
    """

    def __init__(self, function: Callable, static: Sequence[str], options: dict[str, Any]):
        functools.update_wrapper(self, function)
        self._function, self._options = function, {**options, "static_argnames": tuple(static)}
        self._names, self._static = tuple(inspect.signature(function).parameters), frozenset(static)
        jitted = self._jitted()
        self.lower, self.trace = jitted.lower, jitted.trace

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return _PROGRAMS.of(self, self._key(arguments, keywords))(*arguments, **keywords)

    def _cache_size(self) -> int:
        """How many programs are kept. The name is JAX's."""
        return sum(jitted._cache_size() for jitted in _PROGRAMS.all_of(self))

    def _jitted(self, **more: Any) -> Callable:
        # JAX keeps programs per function, so each function made here can be dropped by itself.
        own = functools.wraps(self._function)(lambda *arguments, **keywords: self._function(*arguments, **keywords))
        return jax.jit(own, **self._options, **more)

    def _for_this_machine(self) -> Callable:
        # Not at import time: asking for the platform starts JAX.
        on_gpu = jax.default_backend() == "gpu"
        return self._jitted(compiler_options=GPU_OPTIONS) if on_gpu else self._jitted()

    def _key(self, arguments: tuple, keywords: dict[str, Any]) -> Hashable:
        """The key of a program: static arguments, and structure and shapes of the others; `params` does not count."""
        static, traced = [], []
        for name, value in (*zip(self._names, arguments, strict=False), *keywords.items()):
            if name in self._static:
                static.append((name, value))
            elif name != _PARAMETERS:
                traced.append((name, value))
        leaves, structure = jax.tree_util.tree_flatten(traced)
        return tuple(static), structure, tuple(getattr(leaf, "shape", ()) for leaf in leaves)


class _Programs:
    """Jitted functions by function and key; the most recently used are at the end."""

    def __init__(self):
        self._programs: collections.OrderedDict[tuple[CachedJit, Hashable], Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def of(self, function: CachedJit, key: Hashable) -> Callable:
        with self._lock:
            jitted = self._programs.pop((function, key), None) or function._for_this_machine()
            self._programs[function, key] = jitted
            dropped = [self._programs.popitem(last=False)[1] for _ in range(len(self._programs) - max_programs())]
        for old in dropped:  # a running program is not interrupted
            old.clear_cache()
        return jitted

    def all_of(self, function: CachedJit) -> list:
        with self._lock:
            return [jitted for (owner, _), jitted in self._programs.items() if owner is function]


_PROGRAMS = _Programs()


def jit(function: Callable, static_argnames: str | Sequence[str] = (), **options: Any) -> CachedJit:
    """`jax.jit` for functions of this package that are called with many shapes; see `CachedJit`.

    Args:
        function: takes named arguments; its argument `params` has the same shapes in all calls with one configuration.
        static_argnames, options: as for `jax.jit`.
    """
    static = (static_argnames,) if isinstance(static_argnames, str) else static_argnames
    return CachedJit(function, static, options)
