"""What users call a model, a number type and a quantization on a command line, and what the library calls them."""

import os
import pathlib
from typing import Any

import jax

from lvlm_jax import files
from lvlm_jax.weights import gguf_folder, smol
from lvlm_jax.weights.gguf import SUFFIX
from lvlm_jax.weights.load import DTYPES

NUMBER_TYPES = ("auto", *DTYPES)  # what `dtype` takes


def pocket_file(name: str) -> pathlib.Path:
    """A file or folder of the pocket model, which is part of the package."""
    return pathlib.Path(__file__).parents[1] / "pocket" / name


def checkpoint(name: str | os.PathLike) -> str:
    """The folder or hub id that a user means.

    "pocket" is the model inside the package. "smol" (`weights.smol`) and a GGUF file (`weights.gguf_folder`) become
    folders in the user's cache the first time.

    Raises:
        LVLMError: something that is no name, smol without its language model, or a GGUF file that cannot be read.
    """
    if isinstance(name, str | os.PathLike) and str(name) == "pocket":
        return str(pocket_file("checkpoint"))
    if isinstance(name, str | os.PathLike) and str(name) == "smol":
        return str(smol.composed())
    files.expand(name)
    path = os.path.expanduser(os.fsdecode(name))  # a Path would lose the ./ that no hub id has
    return str(gguf_folder.as_folder(path)) if path.endswith(SUFFIX) and os.path.isfile(path) else path


def dtype(name: Any) -> Any:
    """`auto` is float32 on a CPU, where XLA converts bfloat16 weights on every call, and bfloat16 elsewhere.

    Anything else stays as it is.
    """
    if not isinstance(name, str) or name != "auto":
        return name
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def quant(name: str) -> str | None:
    """What `LVLM.from_pretrained` takes for `--quant`."""
    return None if name == "none" else name


def precision(dtype: str, quant: str | None) -> str:
    """How the record of a run names the precision of its model."""
    return dtype if quant is None else f"{dtype} with {quant} kernels"
