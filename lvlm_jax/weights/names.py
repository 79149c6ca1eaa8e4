"""What users call a model, a number type and a quantization on a command line, and what the library calls them."""

import os
import pathlib

import jax


def pocket_file(name: str) -> pathlib.Path:
    """A file or folder of the pocket model, which is part of the package."""
    return pathlib.Path(__file__).parents[1] / "pocket" / name


def checkpoint(name: str) -> str:
    """What `LVLM.from_pretrained` takes for `--model-path`: `pocket` is the model inside the package."""
    return str(pocket_file("checkpoint")) if name == "pocket" else os.path.expanduser(name)


def dtype(name: str) -> str:
    """`auto` is float32 on a CPU, where XLA converts bfloat16 weights on every call, and bfloat16 elsewhere."""
    if name != "auto":
        return name
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def quant(name: str) -> str | None:
    """What `LVLM.from_pretrained` takes for `--quant`."""
    return None if name == "none" else name


def precision(dtype: str, quant: str | None) -> str:
    """How the record of a run names the precision of its model."""
    return dtype if quant is None else f"{dtype} with {quant} kernels"
