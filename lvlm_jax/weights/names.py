"""Translates names of models, number types and quantizations from a command line."""

import os
import pathlib
from typing import Any

import jax

from lvlm_jax import files
from lvlm_jax.weights import gguf_folder, smol
from lvlm_jax.weights.gguf import SUFFIX
from lvlm_jax.weights.load import DTYPES

NUMBER_TYPES = ("auto", *DTYPES)  # values of `dtype`


def pocket_file(name: str) -> pathlib.Path:
    """A file or folder of the pocket model, which is part of the package."""
    return pathlib.Path(__file__).parents[1] / "pocket" / name


def checkpoint(name: str | os.PathLike) -> str:
    """The folder or hub id that a name stands for.

    "pocket" is the model inside the package. "smol" (`weights.smol`) and a GGUF file (`weights.gguf_folder`) become
    folders in the user's cache on first use.

    Raises:
        LVLMError: not a name, smol without its language model, or an unreadable GGUF file.
    """
    if isinstance(name, str | os.PathLike) and str(name) == "pocket":
        return str(pocket_file("checkpoint"))
    if isinstance(name, str | os.PathLike) and str(name) == "smol":
        return str(smol.complete_checkpoint())
    files.expand(name)
    path = os.path.expanduser(os.fsdecode(name))  # a Path would drop the ./ that distinguishes a folder from a hub id
    return str(gguf_folder.as_folder(path)) if path.endswith(SUFFIX) and os.path.isfile(path) else path


def dtype(name: Any) -> Any:
    """Resolves `auto`: float32 on a CPU, where XLA converts bfloat16 weights in every call, and bfloat16 elsewhere.

    Other values are returned unchanged.
    """
    if not isinstance(name, str) or name != "auto":
        return name
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def quant(name: str) -> str | None:
    """Converts `--quant` to the argument of `LVLM.from_pretrained`."""
    return None if name == "none" else name


def precision(dtype: str, quant: str | None) -> str:
    """The model's precision as the record of a run names it."""
    return dtype if quant is None else f"{dtype} with {quant} kernels"
