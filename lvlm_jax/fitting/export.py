"""Writes Nullu's edit into a checkpoint: W_down <- (I - α Σ v vᵀ) W_down."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp

from lvlm_jax import LVLM
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods.fitted import check_model
from lvlm_jax.methods.nullu import Nullu


def edited(model: LVLM, method: Nullu) -> dict:
    """The model's parameters with the edit; adapters beside the weights stay as they are.

    Raises:
        LVLMError: the directions belong to another model, weights are quantized, or the projection has a bias.
    """
    if method.fitted is not None:
        check_model(method.fitted.source, model.hash, str(model.folder))
    text = model.config.text
    if text.output_norms:
        raise LVLMError("Nullu edits the projection, and this model has a norm after it; use --method nullu")
    language = dict(model.params["language_model"])
    for layer in method.edited(text.num_layers):
        block = language[f"layers_{layer}"]
        down = block["mlp"]["down_proj"]
        if "kernel" not in down or "bias" in down:
            obstacle = "a bias" if "bias" in down else "int8 weights"
            raise LVLMError(f"Nullu edits plain projections, and layer {layer} has {obstacle}; use --method nullu")
        kernel, directions = down["kernel"].astype(jnp.float32), method.directions(layer)
        exact = jax.lax.Precision.HIGHEST
        along = jnp.einsum("IE,RE->IR", kernel, directions, precision=exact)
        edited_kernel = kernel - method.alpha * jnp.einsum("IR,RE->IE", along, directions, precision=exact)
        down = down | {"kernel": edited_kernel.astype(down["kernel"].dtype)}
        language[f"layers_{layer}"] = block | {"mlp": block["mlp"] | {"down_proj": down}}
    return model.params | {"language_model": language}


def export(model: LVLM, method: Nullu, folder: str | os.PathLike, overwrite: bool = False) -> Path:
    """Writes the edited checkpoint, which any software can load.

    Raises:
        LVLMError: see `edited`; or the folder exists already or cannot be written.
    """
    edited_model = LVLM(edited(model, method), model.config, model.folder, model.mesh)
    return edited_model.save_pretrained(folder, overwrite)
