"""Configuration files: Python with a function `get_config()`."""

import importlib.util
import pathlib

import ml_collections

from lvlm_jax.errors import LVLMError


def load_config(path) -> ml_collections.ConfigDict:
    """The `ConfigDict` that `get_config()` of a Python file returns."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise LVLMError(f"config {str(path)!r} is not a file; expected Python with a function get_config()")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None:
        raise LVLMError(f"config {str(path)!r} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:
        raise LVLMError(f"config {str(path)!r} failed: {type(error).__name__}: {error}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise LVLMError(f"get_config() of {str(path)!r} gave {type(config).__name__}; expected a ConfigDict")
    return config
