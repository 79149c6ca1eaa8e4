"""Vision-language models in JAX, with methods against hallucination switched on by one word."""

import importlib
from typing import TYPE_CHECKING, Any

from lvlm_jax.version import __version__

if TYPE_CHECKING:
    from lvlm_jax import methods
    from lvlm_jax.errors import LVLMError
    from lvlm_jax.lvlm import LVLM, Output

__all__ = ["LVLM", "LVLMError", "Output", "__version__", "methods"]

_HOMES = {"LVLM": "lvlm_jax.lvlm", "LVLMError": "lvlm_jax.errors", "Output": "lvlm_jax.lvlm"}


def __getattr__(name: str) -> Any:
    # JAX is imported only when one of these is used: `lvlm --help` needs none of them.
    if name == "methods":
        return importlib.import_module("lvlm_jax.methods")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
