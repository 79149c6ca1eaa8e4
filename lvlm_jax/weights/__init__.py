"""Hugging Face checkpoints: finds, reads, loads and saves them."""

from lvlm_jax.weights.checkpoint import resolve_checkpoint
from lvlm_jax.weights.load import load_parameters, model_config, parameter_dtype, read_config
from lvlm_jax.weights.save import save_checkpoint

__all__ = ["load_parameters", "model_config", "parameter_dtype", "read_config", "resolve_checkpoint", "save_checkpoint"]
