"""Hallucination-mitigation methods, one file each; a method is a value.

Every file in this folder is imported. The methods it registers are available here by class name (`methods.CMAC`) and by
registered name (`methods.get("cmac")`).
"""

from lvlm_jax.methods import registry
from lvlm_jax.methods.base import Method, Readout, Strength, data, strength, switch
from lvlm_jax.methods.chain import chain
from lvlm_jax.methods.parse import as_method
from lvlm_jax.methods.registry import get, names, register
from lvlm_jax.methods.tower import TowerEdit

_CLASSES = registry.walk(__path__, __name__)
globals().update(_CLASSES)

__all__ = [
    *_CLASSES,
    "Method",
    "Readout",
    "Strength",
    "TowerEdit",
    "as_method",
    "chain",
    "data",
    "get",
    "names",
    "register",
    "strength",
    "switch",
]
