"""Where compiled programs are kept: on the disk for the next run, in memory while they are used.

The folders on the disk are private to the user: what lies in them is run as machine code, so a folder that somebody
else owns or may write to is never used. In memory the programs used last are kept, so that a service that is asked for
every shape does not grow without bound.
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

# Set to 0, off, false or no: nothing is read from or written to the disk.
SWITCH = "LVLM_JAX_COMPILATION_CACHE"

# How many programs are kept in memory; with every further one, the program that was used longest ago is dropped.
MOST = "LVLM_JAX_PROGRAMS"
USUALLY = 128  # two to five megabytes each on a CPU for a small model, twenty for one of 7 billion parameters

_PARAMETERS = "params"  # the argument that has the same shapes in all calls with a configuration


def off(switch: str) -> bool:
    """Whether an environment variable says no."""
    return os.environ.get(switch, "").strip().lower() in ("0", "off", "false", "no")


def cache_folder(name: str) -> pathlib.Path:
    """`$XDG_CACHE_HOME/lvlm_jax/name`, or the same under `~/.cache`."""
    # The XDG rule: a relative path in the variable counts as unset.
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        base = pathlib.Path.home() / ".cache"
    return base / "lvlm_jax" / name


def _why_unsafe(folder: pathlib.Path) -> str | None:
    """Why programs found in `folder` must not be run, or None when only this user can have put them there."""
    status = folder.stat()
    if not stat.S_ISDIR(status.st_mode):
        return "it is not a folder"
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        return f"it belongs to user {status.st_uid}, not to you"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "other users may write to it"
    return None


def private_folder(name: str, switch: str) -> pathlib.Path | None:
    """Makes a cache folder, and the one around it, for programs that only this user can have put there.

    None, with a warning that says why and names the variable that silences it, where there can be no such folder.
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
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder can be found
        warnings.warn(f"compiled programs are not kept: {error}; silence this with {switch}=0", stacklevel=3)
        return None
    return folder


def enable_cache() -> pathlib.Path | None:
    """Keep compiled programs on disk from now on; safe to call more than once.

    Returns the folder in use, or None when there is none: switched off by `LVLM_JAX_COMPILATION_CACHE=0`, or the
    folder cannot be made or is not safe to use (a warning says which). A folder already chosen by the user through
    JAX's own `jax_compilation_cache_dir` is left as it is.
    """
    if off(SWITCH):
        return None
    chosen = jax.config.jax_compilation_cache_dir
    if chosen:
        return pathlib.Path(chosen)
    folder = private_folder("xla", SWITCH)
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Start-up runs many programs that compile in a few hundredths of a second each; together they are seconds.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def most_programs() -> int:
    """How many programs are kept in memory: a number of 1 or more in `LVLM_JAX_PROGRAMS`, or as many as usual."""
    word = os.environ.get(MOST, "").strip()
    return int(word) if word.isdecimal() and int(word) > 0 else USUALLY


class Kept:
    """A function that `jax.jit` compiles, which keeps its programs only while they are among those used last.

    `lower` and `trace` are those of `jax.jit`.
    """

    def __init__(self, function: Callable, static: Sequence[str], options: dict[str, Any]):
        functools.update_wrapper(self, function)
        self._function, self._options = function, {**options, "static_argnames": tuple(static)}
        self._names, self._static = tuple(inspect.signature(function).parameters), frozenset(static)
        whole = self._jitted()
        self.lower, self.trace = whole.lower, whole.trace

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _PROGRAMS.of(self, self._key(arguments, named))(*arguments, **named)

    def _cache_size(self) -> int:
        """How many programs are kept; named as in JAX."""
        return sum(jitted._cache_size() for jitted in _PROGRAMS.all_of(self))

    def _jitted(self) -> Callable:
        # JAX keeps programs by function: one of its own can be dropped alone.
        own = functools.wraps(self._function)(lambda *arguments, **named: self._function(*arguments, **named))
        return jax.jit(own, **self._options)

    def _key(self, arguments: tuple, named: dict[str, Any]) -> Hashable:
        """What decides the program besides the parameters: static arguments, and structure and shapes of the others."""
        static, traced = [], []
        for name, value in (*zip(self._names, arguments, strict=False), *named.items()):
            if name in self._static:
                static.append((name, value))
            elif name != _PARAMETERS:
                traced.append((name, value))
        leaves, structure = jax.tree_util.tree_flatten(traced)
        return tuple(static), structure, tuple(getattr(leaf, "shape", ()) for leaf in leaves)


class _Programs:
    """Jitted functions by function and key, those used last at the end."""

    def __init__(self):
        self._kept: collections.OrderedDict[tuple[Kept, Hashable], Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def of(self, function: Kept, key: Hashable) -> Callable:
        with self._lock:
            jitted = self._kept.pop((function, key), None) or function._jitted()
            self._kept[function, key] = jitted
            dropped = [self._kept.popitem(last=False)[1] for _ in range(len(self._kept) - most_programs())]
        for old in dropped:  # one that is running goes on
            old.clear_cache()
        return jitted

    def all_of(self, function: Kept) -> list:
        with self._lock:
            return [jitted for (owner, _), jitted in self._kept.items() if owner is function]


_PROGRAMS = _Programs()


def jit(function: Callable, static_argnames: str | Sequence[str] = (), **options: Any) -> Kept:
    """`jax.jit` for functions of this package that are called with many shapes; see `Kept`.

    Args:
        function: of named arguments; an argument `params` has the same shapes in all calls with one configuration.
        static_argnames, options: of `jax.jit`.
    """
    static = (static_argnames,) if isinstance(static_argnames, str) else static_argnames
    return Kept(function, static, options)
