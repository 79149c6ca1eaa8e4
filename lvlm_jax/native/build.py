"""Compiles `few_rows.cc` with its headers for this machine, once, and registers it with XLA.

The library is in the user's own cache folder. It depends on the source, the compiler with its options for the
processor, and jaxlib. Several processes may build it at once; files appear complete.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile
import warnings

import jax
import jaxlib

from lvlm_jax.compilation import private_folder, switched_off
from lvlm_jax.errors import LVLMError
from lvlm_jax.files import atomic_file

# Set to 0, off, false or no: nothing is compiled, and XLA computes everything.
SWITCH = "LVLM_JAX_NATIVE"

TARGET = "lvlm_jax_few_rows"
EACH = "lvlm_jax_each_rows"
COLUMNS = "lvlm_jax_write_columns"
TILES = "lvlm_jax_many_rows"
ATTENTION = "lvlm_jax_attention"
ATTENTION_GRADIENT = "lvlm_jax_attention_gradient"

_SOURCE = pathlib.Path(__file__).with_name("few_rows.cc")
_HEADERS = tuple(
    _SOURCE.with_name(name) for name in ("attention.h", "for_each.h", "lanes.h", "many_rows.h", "some_rows.h")
)
_OPTIONS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-w")
_SECONDS = 120  # a compiler that takes longer is stuck


@functools.cache
def available() -> bool:
    """Whether products of few rows run here; on the first call, builds the library and registers it with XLA."""
    lib = library()
    if lib is None:
        return False
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(lib.few_rows), platform="cpu")
    jax.ffi.register_ffi_target(EACH, jax.ffi.pycapsule(lib.each_rows), platform="cpu")
    jax.ffi.register_ffi_target(COLUMNS, jax.ffi.pycapsule(lib.write_columns), platform="cpu")
    jax.ffi.register_ffi_target(ATTENTION, jax.ffi.pycapsule(lib.attention), platform="cpu")
    jax.ffi.register_ffi_target(ATTENTION_GRADIENT, jax.ffi.pycapsule(lib.attention_gradient), platform="cpu")
    return True


@functools.cache
def tiles() -> bool:
    """Whether products of many bfloat16 rows run here: the processor has AMX, and the system allows it."""
    lib = library()
    if lib is None:
        return False
    lib.many_rows_ready.restype = ctypes.c_bool
    if not lib.many_rows_ready():
        return False
    jax.ffi.register_ffi_target(TILES, jax.ffi.pycapsule(lib.many_rows), platform="cpu")
    return True


def library() -> ctypes.CDLL | None:
    """The library, built if it is not in the cache folder; None if it cannot be built.

    A failing compiler causes a warning; a missing one does not.
    """
    chosen = None if switched_off(SWITCH) else compiler()
    if chosen is None:
        return None
    try:
        return _loaded(chosen)
    except (OSError, subprocess.SubprocessError, LVLMError) as error:
        output = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        warnings.warn(
            f"products of few rows are left to XLA, which is slower: {chosen} could not compile {_SOURCE.name}: "
            f"{next((line for line in output if 'error' in line), output[0])}; silence this with {SWITCH}=0",
            stacklevel=2,
        )
        return None


def compiler() -> str | None:
    """The C++ compiler: the one that $CXX names, or the first one with a usual name."""
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _loaded(compiler: str) -> ctypes.CDLL:
    folder = private_folder("native", SWITCH)
    if folder is not None:
        return ctypes.CDLL(str(_built(compiler, folder)))
    with tempfile.TemporaryDirectory(prefix="lvlm_jax-") as own:  # a folder for this process alone
        return ctypes.CDLL(str(_built(compiler, pathlib.Path(own))))


def _built(compiler: str, folder: pathlib.Path) -> pathlib.Path:
    """The library's file in a folder, compiled unless a complete one is there.

    An index file, named by everything that determines the library, contains the SHA-256 of the library's file, which is
    also that file's name. A truncated or damaged library is built again: loading it would crash the process.
    """
    processor, knows = _processor_option(compiler)
    key = hashlib.sha256()
    for part in (
        *(path.read_bytes() for path in (_SOURCE, *_HEADERS)),
        knows,
        *(o.encode() for o in (*_OPTIONS, jaxlib.__version__)),
    ):
        key.update(hashlib.sha256(part).digest())
    index = folder / f"few_rows-{key.hexdigest()[:16]}"
    if index.is_file():
        library = folder / f"few_rows-{index.read_text(errors='replace')[:64]}.so"
        if library.is_file() and library.stem == f"few_rows-{_digest(library.read_bytes())}":
            return library
    with tempfile.TemporaryDirectory(prefix="lvlm_jax-") as own:
        result = pathlib.Path(own) / "few_rows.so"
        _run((compiler, *_OPTIONS, processor, f"-I{jax.ffi.include_dir()}", str(_SOURCE), "-o", str(result)))
        content = result.read_bytes()
    library = folder / f"few_rows-{_digest(content)}.so"
    for path, data in ((library, content), (index, _digest(content).encode())):
        with atomic_file(path) as file:
            file.write(data)
    return library


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _processor_option(compiler: str) -> tuple[str, bytes]:
    """The option for all features of the processor, and the macros that the compiler then defines."""

    def macros(option: str) -> bytes:
        return _run((compiler, *_OPTIONS[:1], option, "-dM", "-E", "-x", "c++", os.devnull))

    try:
        return "-march=native", macros("-march=native")
    except subprocess.CalledProcessError:  # clang on some ARM machines
        return "-mcpu=native", macros("-mcpu=native")


def _run(command: tuple[str, ...]) -> bytes:
    completed = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)
    if completed.returncode:
        raise subprocess.CalledProcessError(
            completed.returncode, command, stderr=completed.stderr.decode(errors="replace")
        )
    return completed.stdout
