"""Nullu's edit written into a checkpoint: W_down <- (I - α Σ v vᵀ) W_down."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp

from lvlm_jax import LVLM
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods.fitted import check_model
from lvlm_jax.methods.nullu import Nullu


def edited(model: LVLM, method: Nullu) -> dict:
    """The model's parameters with the edit in them; adapters beside the weights are left as they are.

    Raises:
        LVLMError: fitted for another model, quantized weights, or a bias behind the projection.
    """
    if method.fitted is not None:
        check_model(method.fitted.source, model.hash, str(model.folder))
    text = model.config.text
    if text.output_norms:
        raise LVLMError("Nullu edits the projection, and this model has a norm behind it; use --method nullu")
    language = dict(model.params["language_model"])
    for layer in method.edited(text.num_layers):
        block = language[f"layers_{layer}"]
        down = block["mlp"]["down_proj"]
        if "kernel" not in down or "bias" in down:
            what = "a bias" if "bias" in down else "int8 weights"
            raise LVLMError(f"Nullu edits plain projections, and layer {layer} has {what}; load the model without")
        kernel, directions = down["kernel"].astype(jnp.float32), method.directions(layer)
        exact = jax.lax.Precision.HIGHEST
        along = jnp.einsum("IE,RE->IR", kernel, directions, precision=exact)
        kept = kernel - method.alpha * jnp.einsum("IR,RE->IE", along, directions, precision=exact)
        down = down | {"kernel": kept.astype(down["kernel"].dtype)}
        language[f"layers_{layer}"] = block | {"mlp": block["mlp"] | {"down_proj": down}}
    return model.params | {"language_model": language}


def export(model: LVLM, method: Nullu, folder: str | os.PathLike, overwrite: bool = False) -> Path:
    """Writes the edited checkpoint, which any software loads.

    Raises:
        LVLMError: see `edited`; the folder is in the way or cannot be written.
    """
    changed = LVLM(edited(model, method), model.config, model.folder, model.mesh)
    return changed.save_pretrained(folder, overwrite)
