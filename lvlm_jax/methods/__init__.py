"""Hallucination-mitigation methods: one file each, every one a value."""

from lvlm_jax.methods.base import Method, Strength, get, names, register, strength, switch
from lvlm_jax.methods.cmac import CMAC

__all__ = ["CMAC", "Method", "Strength", "get", "names", "register", "strength", "switch"]
