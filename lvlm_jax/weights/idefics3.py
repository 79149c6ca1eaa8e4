"""The key table of Idefics3, which is that of SmolVLM."""

from lvlm_jax.weights.smolvlm import TABLE

__all__ = ["TABLE"]
