"""A persistent cache of compiled programs, so that a second run of the same model starts without compiling.

Its folders are private to the user: what lies in them is run as machine code, so a folder that somebody else owns or
may write to is never used.
"""

import os
import pathlib
import stat
import warnings

import jax

# Set to 0, off, false or no: nothing is read from or written to the disk.
SWITCH = "LVLM_JAX_COMPILATION_CACHE"


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
