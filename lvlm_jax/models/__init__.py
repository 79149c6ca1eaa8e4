"""Model families, keyed by the `model_type` of a Hugging Face `config.json`.

A family is a configuration class (`from_hf`) and a Linen module with `encode_images`, `embed`, `decode`
and `head`. Adding one is a file here, a line in `FAMILIES` and a key table in `weights/`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lvlm_jax.attention.context import Context
from lvlm_jax.errors import LVLMError
from lvlm_jax.models.config import DecoderConfig, LlavaConfig, VisionConfig
from lvlm_jax.models.llava import Llava

__all__ = [
    "FAMILIES",
    "DecoderConfig",
    "LlavaConfig",
    "VisionConfig",
    "abstract_parameters",
    "build",
    "config_from_hf",
]

FAMILIES: dict[str, tuple[type, type[nn.Module]]] = {"llava": (LlavaConfig, Llava)}


def config_from_hf(raw: dict[str, Any]) -> LlavaConfig:
    """Reads the dict of a Hugging Face `config.json`.

    Raises:
        LVLMError: the model type or a value in the configuration is not supported.
    """
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise LVLMError(f"model_type {model_type!r} is not supported; expected one of {', '.join(FAMILIES)}")
    # Imported here: reading a configuration is the only thing in this room that needs transformers.
    from transformers import CONFIG_MAPPING

    try:
        hf = CONFIG_MAPPING[model_type].from_dict(raw)
    except Exception as error:  # transformers raises whatever the first bad field provokes
        raise LVLMError(
            f"config.json is not a valid {model_type} configuration: {' '.join(str(error).split())}"
        ) from error
    return FAMILIES[model_type][0].from_hf(raw, hf)


def build(config: LlavaConfig, dtype: DTypeLike = jnp.float32, remat: bool = False) -> nn.Module:
    """The Linen module of a configuration. `dtype` is the compute dtype."""
    return FAMILIES[config.model_type][1](config, jnp.dtype(dtype), remat)


def abstract_parameters(config: LlavaConfig, dtype: DTypeLike = jnp.float32) -> dict:
    """The parameter tree of a configuration as `jax.ShapeDtypeStruct` leaves; nothing is allocated."""
    module = build(config, dtype)
    image = config.vision.image_size

    def create(key: jax.Array) -> dict:
        tokens = jnp.zeros((1, 1), jnp.int32)
        context = Context(
            image_id=jnp.zeros((1, 1), jnp.int32),
            positions=tokens,
            first_row=jnp.zeros((), jnp.int32),
            image_end=jnp.zeros((1,), jnp.int32),
        )
        return module.init(key, tokens, jnp.zeros((1, 3, image, image)), context)["params"]

    shapes = jax.eval_shape(create, jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
