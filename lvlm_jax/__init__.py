"""Vision-language models in JAX, with methods against hallucination switched on by one word."""

from lvlm_jax import methods
from lvlm_jax.errors import LVLMError
from lvlm_jax.lvlm import LVLM, Output
from lvlm_jax.version import __version__

__all__ = ["LVLM", "LVLMError", "Output", "__version__", "methods"]
